"""Whether two mathematical answers are the same: math-verify, in a process of its own that can be killed.

No time limit inside a process stops ``9^{9^{9^9}}``: the interpreter is in one long multiplication and sees no signal,
and math-verify's own limit works in the main thread only. So this file is two things. Imported, it is :func:`equal`.
Run as a program, by path and therefore without torch, it is the process that compares: it imports math-verify once,
parses a few answers (the parser's tables take tenths of a second to build), and forks a child that compares. A
comparison that takes too long costs that child its life, and the next one is a fork away.

Where there is no fork (Windows) the process compares itself, and a new one starts while the caller goes on.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

SECONDS = 0.7
"""What one comparison may take. The rest of the second is for whoever waits."""

_GRACE = 0.2
_START = 120.0
_MEMORY = 4 << 30
_LONGEST = 1000
_FORKS = hasattr(os, "fork")


class _Process:
    """The program below, at the other end of two pipes."""

    def __init__(self) -> None:
        search = [str(Path(entry).absolute()) for entry in sys.path if entry]
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).resolve())],
            bufsize=0,  # a buffer has a lock, which a fork could inherit closed
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(search)},
            start_new_session=True,  # Ctrl-C is for the one who asks
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )
        self._ready = False

    def ask(self, gold: str, answer: str) -> bool | None:
        """The verdict; ``None`` where there was none in time, after which the process is of no use."""
        if not self._ready:
            if self._exchange(b"", _START) != b"ready\n":
                self.close()
                raise RuntimeError("the process that compares answers does not start; see that math-verify imports")
            self._ready = True
        verdict = self._exchange(json.dumps([gold, answer]).encode() + b"\n", SECONDS + _GRACE)
        return None if verdict is None else verdict == b"1\n"

    def _exchange(self, request: bytes, seconds: float) -> bytes | None:
        """Sends a line, reads a line; ``None`` after ``seconds``, or where the process died."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        read: list[bytes] = []

        def talk() -> None:
            with suppress(OSError, ValueError):
                stdin.write(request)
                read.append(stdout.readline())

        thread = threading.Thread(target=talk, daemon=True)  # the only way to wait for a pipe on every system
        thread.start()
        thread.join(seconds)
        return read[0] if read and read[0] else None

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def close(self, patience: float = 0.0) -> None:
        """Ends the process and what it forked: with ``patience``, in seconds, by asking first."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(patience)
        if self._process.returncode is None:
            with suppress(OSError):
                if _FORKS:
                    os.killpg(self._process.pid, signal.SIGKILL)
                else:
                    self._process.kill()
            self._process.wait()
        self.abandon()

    def abandon(self) -> None:
        """Lets go of the process without touching it: what a fork does with its parent's."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
        if self._process.returncode is None:
            self._process.returncode = 0  # not ours to wait for


_lock = threading.RLock()
_process: _Process | None = None


def start() -> None:
    """Starts the process that compares, if it is not running, and does not wait for it.

    Raises:
        ImportError: math-verify is not installed.
    """
    global _process
    with _lock:
        if _process is None:
            if find_spec("math_verify") is None:
                raise ImportError('comparing mathematics needs math-verify: pip install "tinylora_lite[train]"')
            _process = _Process()


def equal(gold: str, answer: str) -> bool:
    """Whether math-verify takes ``answer`` for ``gold``; ``False`` also where it does not know within a second.

    Safe in threads (comparisons wait for one another), in forks and under any way of starting Python. The first call
    in a process waits for :func:`start`, a few seconds.

    Raises:
        ImportError: math-verify is not installed.
        RuntimeError: the process that compares does not start.
    """
    global _process
    if max(len(gold), len(answer)) > _LONGEST:
        return False
    with _lock:
        if _process is not None and not _process.alive:  # the system may kill it for memory that others took
            _close(0.0)
        start()
        assert _process is not None
        verdict = None
        try:
            verdict = _process.ask(gold, answer)
        finally:  # after an interrupt the reply would answer the next question
            if verdict is None:
                _close(0.0)
        if verdict is None:
            start()
        return bool(verdict)


def _close(patience: float = 2.0) -> None:
    global _process
    if _process is not None:
        _process.close(patience)
        _process = None


def _forget() -> None:
    global _lock, _process
    _lock = threading.RLock()  # a thread that the fork left behind may have held it
    if _process is not None:
        _process.abandon()
        _process = None


# --- the program -----------------------------------------------------------------------------------------------------


def _comparison() -> Callable[[str, str], bool]:
    """Math-verify's comparison, its parser's tables built by comparing what answers are made of."""
    import logging
    import re

    from math_verify import parse, verify
    from math_verify.parser import LatexExtractionConfig

    logging.disable()
    exponent = re.compile(r"(?<=[0-9])[eE]([-+]?[0-9]+)\b")  # 4.5e33 would be 4.5 times e times 33

    def compare(gold: str, answer: str) -> bool:
        def read(text: str) -> list[object]:
            boxed = r"\boxed{" + exponent.sub(r"\\times 10^{\1}", text) + "}"
            found: list[object] = parse(boxed, [LatexExtractionConfig(boxed_match_priority=0)], parsing_timeout=None)
            return found

        try:
            return bool(verify(read(gold), read(answer), timeout_seconds=None))
        except Exception:
            return False

    usual = r"1.0 -\frac{1}{2} \sqrt{3}/2 x^2+2y-1 2\pi [1,2) (-\infty,3]\cup(4,5) \{1,2\} (1,2,3) x=3 10^{3} 50\% "
    usual += r"30^\circ \text{east} \begin{pmatrix}1\\2\end{pmatrix} 4.5\times10^{3} 12\text{cm} \binom{5}{2} \log_{2}3"
    for text in usual.split():
        compare(text, f"{text} ")
        compare("2", text)
    return compare


class _Child:
    """A fork that compares, one pair after the other, for as long as each takes less than :data:`SECONDS`."""

    def __init__(self, compare: Callable[[str, str], bool]) -> None:
        self._compare = compare
        self._pid = 0

    def __call__(self, gold: str, answer: str) -> bool:
        import select

        if not self._pid:
            self._fork()
        os.write(self._to, json.dumps([gold, answer]).encode() + b"\n")
        there, _, _ = select.select([self._from], [], [], SECONDS)
        reply = os.read(self._from, 1) if there else b""
        if not reply:  # too slow, or dead of hunger for memory or stack
            self.end()
            self._fork()
        return reply == b"1"

    def end(self) -> None:
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
            os.close(self._to)
            os.close(self._from)
            self._pid = 0

    def _fork(self) -> None:
        read_request, self._to = os.pipe()
        self._from, write_reply = os.pipe()
        self._pid = os.fork()
        if self._pid:
            os.close(read_request)
            os.close(write_reply)
            return
        try:
            for end in (self._to, self._from, 0):
                os.close(end)
            with suppress(ImportError, ValueError, OSError):  # macOS lets nobody limit memory
                import resource

                resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
            for line in os.fdopen(read_request, "rb"):
                signal.setitimer(signal.ITIMER_REAL, 2 * SECONDS)  # kills even where nobody is left to do it
                verdict = self._compare(*json.loads(line))
                signal.setitimer(signal.ITIMER_REAL, 0)
                os.write(write_reply, b"1" if verdict else b"0")
        finally:
            os._exit(0)


def _serve() -> None:
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # whatever a library prints is no reply
    compare = _comparison()
    child = _Child(compare) if _FORKS else None
    replies.write(b"ready\n")
    for line in sys.stdin.buffer:
        replies.write(b"1\n" if (child or compare)(*json.loads(line)) else b"0\n")
    if child:
        child.end()


if __name__ == "__main__":
    _serve()
else:
    atexit.register(_close)
    if _FORKS:
        os.register_at_fork(after_in_child=_forget)
