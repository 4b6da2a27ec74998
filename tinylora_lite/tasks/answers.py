"""Where the answer of a completion is, and which number it is.

Every function takes any text, in time linear in its length: completions come from a model that reinforcement learning
rewards for finding gaps.
"""

from __future__ import annotations

import re
from collections import deque
from fractions import Fraction
from typing import Literal

Form = Literal["####", "boxed"]
"""The format that an answer is asked in: after ``####`` (GSM8K's own), or inside ``\\boxed{}`` (that of MATH)."""

# Groups and digits are bounded. Without that, a megabyte of ",000" takes time quadratic in its length.
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3}){1,12}(?![0-9])|[0-9]{1,40}(?![0-9]))(?:\.[0-9]{1,40}(?![0-9]))?|\.[0-9]{1,40}"
_NUMBER = re.compile(
    rf"(?<![0-9])(?P<sign>[-+]?)(?:\$\s?)?(?P<minus>-?)(?P<digits>{_DIGITS})(?:/(?P<under>[0-9]{{1,40}})(?![0-9]))?"
)
_BOX = re.compile(r"\\boxed\s{0,9}\{")
_PHRASE = re.compile(r"answer\s{0,9}(?:is|:)\s{0,9}:?", re.IGNORECASE)
_INLINE = re.compile(r"\$([^$\n]{1,1000})\$|\\\((.{1,1000}?)\\\)")
_FRACTION = re.compile(r"(?<![0-9])\\[dt]?frac\{(-?[0-9]{1,40})\}\{([0-9]{1,40})\}")
_DECORATION = re.compile(r"\\[!,;: ]|\\(?=[$%])|\{(?=[,0-9])|(?<=[,0-9])\}|\\(?:text|mathrm|left|right)\b")
_DASHES = str.maketrans({"\u2212": "-", "\u2013": "-", "\uff0d": "-", "\u00a0": " ", "\u202f": " "})


def marked_answer(text: str, form: Form) -> str | None:
    r"""The answer in the format asked for; ``None`` where the text does not keep it.

    The last mark counts. After ``####`` the answer is the rest of the line. A last box that never closes, or holds
    nothing, is no answer.

    >>> marked_answer("18 - 2 = 16.\n#### 16", "####"), marked_answer(r"so \boxed{\frac{1}{2}}.", "boxed")
    ('16', '\\frac{1}{2}')
    """
    if form == "####":
        return _line(text.rpartition("####")[2]) if "####" in text else None
    mark = _last(_BOX, text)
    if mark is None:
        return None
    start, depth = mark.end(), 1
    for brace in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):  # an escaped brace belongs to the answer
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[start : start + brace.start()].strip() or None
    return None


def likely_answers(text: str, form: Form) -> list[str]:
    r"""Where a lenient reader looks, best first.

    The format asked for, then the other one, then the sentence after the last "answer is" or "answer:", then the last
    formula between dollar signs or ``\( \)``.
    """
    found = [marked_answer(text, form), marked_answer(text, "boxed" if form == "####" else "####")]
    if phrase := _last(_PHRASE, text):
        sentence = _line(text[phrase.end() :]) or ""
        formula = _INLINE.match(sentence)
        found.append(formula[0] if formula else re.split(r"\.(?:\s|$)", sentence, maxsplit=1)[0].strip(" *_"))
    if formula := _last(_INLINE, text):
        found.append(formula[0])
    return [answer for answer in found if answer]


def exact_number(answer: str) -> Fraction | None:
    """The number that an answer is, exactly; ``None`` where it is no number, or more than one.

    Signs, thousands separators, a dollar sign, decimals, a simple fraction and a unit after the number are read.

    >>> [str(exact_number(a)) for a in ("1,000", "$-3.50 each", "18.00", "3/4", "18 or 19", "eggs")]
    ['1000', '-7/2', '18', '3/4', 'None', 'None']
    """
    plain = _plain(answer)
    match = _NUMBER.match(plain)
    # With a second number after it, it is something else: 1,23 or 18 or 19 or 2^10.
    return None if match and re.search(r"[0-9/^=]", plain[match.end() :]) else _value(match)


def plain_decimal(answer: str) -> Fraction | None:
    """The number that an answer is if it is written with digits alone, a sign and a point; ``None`` otherwise."""
    return Fraction(answer) if re.fullmatch(r"[-+]?(?:[0-9]{1,40}(?:\.[0-9]{0,40})?|\.[0-9]{1,40})", answer) else None


def first_number(text: str) -> Fraction | None:
    """The first number of a text, or the first after its last equals sign; ``None`` where there is none."""
    return _value(_NUMBER.search(_plain(text.rpartition("=")[2])))


def last_number(text: str) -> Fraction | None:
    """The last number of a text; ``None`` where there is none.

    >>> print(last_number("She sells 9 eggs at $2, so she makes $18."))
    18
    """
    return _value(_last(_NUMBER, text.translate(_DASHES)))


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    return next(iter(deque(pattern.finditer(text), maxlen=1)), None)


def _line(text: str) -> str | None:
    return text.strip().split("\n", 1)[0].strip() or None


def _plain(answer: str) -> str:
    """Without the LaTeX that decorates numbers."""
    answer = _FRACTION.sub(r"\1/\2", answer[:1000].translate(_DASHES))
    return _DECORATION.sub("", answer.lstrip(" $\t\n").rstrip(" $\t\n.")).strip()


def _value(match: re.Match[str] | None) -> Fraction | None:
    if match is None or (under := int(match["under"] or 1)) == 0:
        return None
    value = Fraction(match["digits"].replace(",", "")) / under
    return -value if (match["sign"] == "-") != (match["minus"] == "-") else value
