"""The program that compares mathematical answers with math-verify; ``math_equal`` starts it by its path.

It imports math-verify once and builds the parser's tables, which takes a few seconds. Then it forks a child that
answers the requests. An alarm ends the child where a comparison takes longer than :data:`SECONDS`, also inside one long
multiplication, and the next child is a fork away. Windows has no fork: there the program itself answers, and its caller
ends it.

Requests are lines of JSON, ``[gold, answer]``. A reply is one byte: ``r`` once, when the program is ready; then ``1``
for equal, ``0`` for different, and ``?`` where the child died of the comparison.

Imported, this module is its constants. It imports neither torch nor anything else of this library.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress

SECONDS = 0.7
"""The time limit of one comparison; the rest of the second is for the caller."""

_FORKS = hasattr(os, "fork")
_MEMORY = 4 << 30  # bytes
_USUAL = r"""
1.0 -\frac{1}{2} \sqrt{3}/2 x^2+2y-1 2\pi [1,2) (-\infty,3]\cup(4,5) \{1,2\} (1,2,3) x=3 10^{3} 50\% 30^\circ
\text{east} \begin{pmatrix}1\\2\end{pmatrix} 4.5\times10^{3} 12\text{cm} \binom{5}{2} \log_{2}3
"""


def _comparison() -> Callable[[str, str], bool]:
    """Math-verify's comparison, after it has parsed what answers are usually made of."""
    import logging
    import re

    from math_verify import parse, verify
    from math_verify.parser import LatexExtractionConfig

    logging.disable()
    exponent = re.compile(r"(?<=[0-9])[eE]([-+]?[0-9]+)\b")  # math-verify reads 4.5e33 as 4.5 times e times 33

    def read(text: str) -> list[object]:
        boxed = r"\boxed{" + exponent.sub(r"\\times 10^{\1}", text) + "}"
        found: list[object] = parse(boxed, [LatexExtractionConfig(boxed_match_priority=0)], parsing_timeout=None)
        return found

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
