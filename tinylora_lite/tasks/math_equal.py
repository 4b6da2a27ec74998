"""Whether two mathematical answers are the same: math-verify, in a process of its own that can be killed.

No time limit inside a process stops ``9^{9^{9^9}}``: the interpreter is in one multiplication and sees no signal, and
math-verify's own limit works in the main thread only. So :mod:`~tinylora_lite.tasks.math_worker` compares, as a program
that this module starts once and talks to through two pipes.

Pebble and multiprocessing do not replace it: their workers run a script that has no ``__main__`` guard again
(forkserver, spawn), or inherit the threads and the memory of a process that holds a model (fork).
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import threading
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from tinylora_lite.tasks import math_worker

_GRACE = 0.2  # seconds beyond the program's own limit, after which it is not coming back
_START = 120.0  # seconds
_LONGEST = 1000  # characters

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
            [sys.executable, "-P", math_worker.__file__],
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

    Safe in threads (comparisons wait for one another), in forks and under any way of starting Python. The first call
    in a process waits a few seconds for the process that compares.

    Raises:
        ImportError: math-verify is not installed.
        RuntimeError: the process that compares does not start.
    """
    global _ready
    if max(len(gold), len(answer)) > _LONGEST:
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
            reply = _exchange(json.dumps([gold, answer]).encode() + b"\n", math_worker.SECONDS + _GRACE)
        finally:
            if reply is None:  # also after an interrupt: a late reply would answer the next question
                _close()
        if reply is None:
            start()
        return reply == b"1"


def _exchange(request: bytes, seconds: float) -> bytes | None:
    """The program's reply; ``None`` where none came in time, after which the program has to be ended."""
    assert _process is not None
    stdin, stdout = _process.stdin, _process.stdout
    assert stdin is not None
    assert stdout is not None
    replies: list[bytes] = []

    def talk() -> None:
        with suppress(OSError, ValueError):
            stdin.write(request)
            replies.append(stdout.read(1))

    thread = threading.Thread(target=talk, daemon=True)  # Windows has no other way to wait for a pipe
    thread.start()
    thread.join(seconds)
    return replies[0] if replies and replies[0] else None


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


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
