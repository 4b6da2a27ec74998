"""Whether two mathematical answers are the same: math-verify, in a process of its own that can be killed.

No time limit inside a process stops ``9^{9^{9^9}}``: the interpreter is in one multiplication and sees no signal, and
math-verify's own limit works in the main thread only. So this file is also the program that compares: the library
starts it once, by its path, and talks to it through two pipes. It imports nothing else of this library.

The program gets ready in a few seconds. Then it forks a child that answers the requests. An alarm ends the child where
a comparison takes longer than ``SECONDS``, and the next child is a fork away. Windows has no fork: there the program
itself answers, and its caller ends it. Requests are lines of JSON, ``[gold, answer]``. A reply is one byte: ``r`` once,
when the program is ready; then ``1`` for equal, ``0`` for different, and ``?`` where the child died of the comparison.

Pebble and multiprocessing do not replace it: their workers run a script that has no ``__main__`` guard again
(forkserver, spawn), or inherit the threads and the memory of a process that holds a model (fork).
"""

from __future__ import annotations

import atexit
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import Any

SECONDS = 0.7
"""The time limit of one comparison; the rest of the second is for the caller."""
_GRACE = 0.2  # seconds beyond the program's own limit, after which it is not coming back
_START = 120.0  # seconds
_LONGEST = 1000  # characters
_DEEPEST = 30  # brackets
# Towers of powers, exponents of six digits, factorials of five: comparing one would take until the time limit.
_HOPELESS = re.compile(
    r"[0-9]\s*(?:\^|\*\*)\s*(?:[{(\s]*[0-9.]+|\(\s*[0-9.]+\s*\))\s*(?:\^|\*\*)"
    r"|(?:\^|\*\*)\s*[{(]?\s*-?[0-9]{6,}|[0-9]{5,}[})\s]*!"
)
_MEMORY = 4 << 30  # bytes
_FORKS = hasattr(os, "fork")
_USUAL = r"""
1.0 -\frac{1}{2} \sqrt{3}/2 x^2+2y-1 2\pi [1,2) (-\infty,3]\cup(4,5) \{1,2\} (1,2,3) x=3 10^{3} 50\% 30^\circ
\text{east} \begin{pmatrix}1\\2\end{pmatrix} 4.5\times10^{3} 12\text{cm} \binom{5}{2} \log_{2}3
"""

_lock = threading.RLock()
_process: subprocess.Popen[bytes] | None = None
_ready = False


def start() -> None:
    """Starts the process that compares, if it is not running, and does not wait for it.

    Raises:
        ImportError: math-verify is not installed.
    """
    global _process, _ready
    with _lock:
        if _process is not None:
            return
        if find_spec("math_verify") is None:
            raise ImportError('comparing mathematics needs math-verify: pip install "tinylora_lite[train]"')
        path = [str(Path(entry).absolute()) for entry in sys.path if entry]
        _ready = False
        _process = subprocess.Popen(
            [sys.executable, "-P", __file__],
            bufsize=0,  # a buffer has a lock, and a fork could inherit it closed
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
            start_new_session=True,  # keeps Ctrl-C away from it
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )


def equal(gold: str, answer: str) -> bool:
    """Whether math-verify takes ``answer`` for ``gold``; ``False`` also where it does not know within a second.

    Safe in threads (comparisons wait for one another), in forks and under any way of starting Python.

    Raises:
        ImportError: math-verify is not installed.
        RuntimeError: the process that compares does not start.
    """
    global _ready
    if max(len(gold), len(answer)) > _LONGEST or _HOPELESS.search(answer):
        return False
    if max(accumulate((sign in "({[") - (sign in ")}]") for sign in answer), default=0) > _DEEPEST:
        return False
    with _lock:
        if _process is not None and _process.poll() is not None:  # killed from outside, for memory perhaps
            _close()
        start()
        reply = None
        try:
            if not _ready and _exchange(b"", _START) != b"r":
                raise RuntimeError("the process that compares answers does not start; see that math-verify imports")
            _ready = True
            reply = _exchange(json.dumps([gold, answer]).encode() + b"\n", SECONDS + _GRACE)
        finally:
            if reply is None:  # also after an interrupt: a late reply would answer the next question
                _close()
        if reply is None:
            start()
        return reply == b"1"


def _exchange(request: bytes, seconds: float) -> bytes | None:
    """The program's reply; ``None`` where none came in time, and the program was killed."""
    assert _process is not None
    assert _process.stdin is not None
    assert _process.stdout is not None
    timer = threading.Timer(seconds, _process.kill)  # Windows has no other way to stop waiting for a pipe
    timer.start()
    try:
        _process.stdin.write(request)
        return _process.stdout.read(1) or None
    except OSError:
        return None
    finally:
        timer.cancel()


@atexit.register
def _close() -> None:
    global _process
    if _process is not None:
        _process.kill()
        _process.wait()
        with _process:  # closes the pipes
            _process = None


def _forget() -> None:
    """Lets a fork start a process of its own."""
    global _lock
    _lock = threading.RLock()  # another thread of the parent may have held it
    if _process is not None:
        _process.returncode = 0  # the parent's to end and to wait for
        _close()


if _FORKS:
    os.register_at_fork(after_in_child=_forget)


def _comparison() -> Callable[[str, str], bool]:
    """Math-verify's comparison, after it has parsed what answers are usually made of."""
    import logging

    from math_verify import parse, verify
    from math_verify.parser import LatexExtractionConfig

    logging.disable()
    exponent = re.compile(r"(?<=[0-9])[eE]([-+]?[0-9]+)\b")  # math-verify reads 4.5e33 as 4.5 times e times 33

    def read(text: str) -> Any:
        boxed = r"\boxed{" + exponent.sub(r"\\times 10^{\1}", text) + "}"
        return parse(boxed, [LatexExtractionConfig(boxed_match_priority=0)], parsing_timeout=None)

    def compare(gold: str, answer: str) -> bool:
        try:
            return bool(verify(read(gold), read(answer), timeout_seconds=None))
        except Exception:
            return False

    for text in _USUAL.split():
        compare(text, f"{text} ")
        compare("2", text)
    return compare


def _serve() -> None:
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # keeps what a library prints out of the replies
    with suppress(ImportError, ValueError, OSError):  # macOS allows no such limit
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    compare = _comparison()
    replies.write(b"r")
    while _FORKS and (child := os.fork()):
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code >= 0 or code == -signal.SIGKILL:  # no more requests; or killed from outside, maybe between two of them
            return
        replies.write(b"?")
    for line in sys.stdin.buffer:
        if _FORKS:
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
        verdict = compare(*json.loads(line))
        if _FORKS:
            signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(b"1" if verdict else b"0")


if __name__ == "__main__":
    _serve()
