r"""Rewards for mathematics: 1.0 for the right answer, 0.0 for anything else, and never an exception.

Each is *strict* by default: the answer counts only in the format that was asked for, after ``####`` or in the last
``\boxed{}``. With ``lenient=True`` it counts wherever a reader would find it. The two differ by as much as the effects
that papers report (verl issue 2150, simpleRL-reason issue 60), so this project reports both.

The reward of any completion takes at most a second. The first comparison of mathematics in a process takes a few
seconds more, to start the process that compares; :func:`~tinylora_lite.load_task` starts it early.
"""

from __future__ import annotations

from tinylora_lite.tasks import answers
from tinylora_lite.tasks.answers import Form
from tinylora_lite.tasks.math_equal import equal

_LONGEST = 200_000  # characters of a completion


def gsm8k_reward(completion: str, gold: str, *, form: Form = "####", lenient: bool = False) -> float:
    r"""1.0 if a completion answers with the number ``gold``, 0.0 otherwise; numbers are compared exactly.

    Signs, thousands separators, dollar signs, decimals and a unit after the number are read, so 18, 18.00 and $18
    are equal. A strict answer holds one number: ``#### 18 or 19`` is none.

    Args:
        completion: the text of the answer; its last 200,000 characters are read.
        gold: the right number, or a worked answer of GSM8K, whose number follows ``####``.
        form: where the answer must be: ``"####"`` (GSM8K's own) or ``"boxed"`` (under the boxed prompt).
        lenient: takes the first of these that holds a number: the answer in ``form``, in the other form, after the
            last "answer is", in the last formula; otherwise the last number of the text.

    >>> gsm8k_reward("9 * 2 = 18\n#### $18.00", "18"), gsm8k_reward("The answer is 18.", "18")
    (1.0, 0.0)
    >>> gsm8k_reward("The answer is 18.", "18", lenient=True), gsm8k_reward(r"\boxed{18}", "18", form="boxed")
    (1.0, 1.0)
    """
    completion = _text(completion)[-_LONGEST:]
    right = answers.exact_number(_text(gold).rpartition("####")[2])
    if right is None:
        return 0.0
    if not lenient:
        answer = answers.marked_answer(completion, form)
        return float(answer is not None and answers.exact_number(answer) == right)
    for answer in answers.likely_answers(completion, form):
        if (number := answers.first_number(answer)) is not None:
            return float(number == right)
    return float(answers.last_number(completion) == right)


def math_reward(completion: str, gold: str, *, form: Form = "boxed", lenient: bool = False) -> float:
    r"""1.0 if a completion's answer equals ``gold``, 0.0 otherwise; ``math-verify`` decides what is equal.

    Equal strings and equal decimals (27 and 27.0) are decided without it. An answer that it cannot decide on within a
    second is wrong, and so are towers of powers, exponents of six digits, factorials of five, brackets deeper than 30
    and answers of over 1,000 characters.

    Args:
        completion: the text of the answer; its last 200,000 characters are read.
        gold: the right answer, in LaTeX or plain; numbers are taken too.
        form: where the answer must be: ``"boxed"`` or ``"####"``.
        lenient: takes the first of these that there is: the answer in ``form``, in the other form, after the last
            "answer is", the last formula, the last number.

    Raises:
        ImportError: math-verify is not installed (``pip install "tinylora_lite[train]"``).

    >>> math_reward(r"so $x = \boxed{27}$.", "27.0"), math_reward("so x is 27.", "27.0")
    (1.0, 0.0)
    >>> math_reward("so x is 27.", "27.0", lenient=True)
    1.0
    """
    completion, gold = _text(completion)[-_LONGEST:], _text(gold)
    found = answers.likely_answers(completion, form) if lenient else [answers.marked_answer(completion, form) or ""]
    if found:
        return float(_same(_bare(gold), _bare(found[0])))
    number = answers.last_number(completion)
    return float(number is not None and number == answers.exact_number(gold))


def keeps_format(completion: str, *, form: Form, number: bool = False) -> bool:
    """Whether there is an answer in the format asked for, right or wrong; with ``number``, one that is a number."""
    answer = answers.marked_answer(_text(completion)[-_LONGEST:], form)
    return answer is not None and (not number or answers.exact_number(answer) is not None)


def _text(value: object) -> str:
    """The value as text: data sets hold numbers and lists where their cards promise strings."""
    try:
        return str(value)
    except Exception:  # an integer of 5,000 digits, for one
        return ""


def _same(gold: str, answer: str) -> bool:
    if not gold or not answer:
        return False
    one, other = answers.plain_decimal(gold), answers.plain_decimal(answer)
    if gold == answer or (one is not None and one == other):
        return True
    if one is not None and other is not None and abs(one - other) > abs(one) / 1000:
        return False  # math-verify rounds, but not that far
    return equal(gold, answer)


def _bare(answer: str) -> str:
    r"""Without the marks that only say "mathematics": $, \( \), \[ \], and a full stop at the end."""
    answer = answer.strip().removesuffix(".").strip()
    for left, right in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        inner = answer.removeprefix(left).removesuffix(right)
        if len(inner) == len(answer) - len(left) - len(right) and left not in inner:
            return inner.strip()
    return answer
