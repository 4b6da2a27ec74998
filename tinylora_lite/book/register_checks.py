"""What the register takes, and what it says of a record that it does not take."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinylora_lite.book.runs import Result

METHODS = ("grpo", "sft")
SHARES = ("accuracy", "low", "high", "lenient", "lenient_low", "lenient_high", "truncated", "formatted")
"""What a score holds between 0 and 1; it holds n, samples and, where known, tokens beside them."""

REQUIRED = ("accuracy", "low", "high", "n", "samples")


def fields_of(kind: type[Any], values: Any, where: str) -> dict[str, Any]:
    """The fields of a record as a file holds them, none unknown and none missing."""
    if not isinstance(values, dict):
        raise ValueError(f"{where} is a {type(values).__name__} where fields are expected")
    names = {f.name for f in fields(kind)}
    required = {f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING}
    for what, odd in (("unknown", values.keys() - names), ("missing", required - values.keys())):
        if odd:
            raise ValueError(f"{where} has {what} fields: {', '.join(sorted(odd))}")
    return dict(values)


def check(result: Result) -> None:
    """Raises ``ValueError`` for the first value that a reader could not rely on."""
    for name in ("model", "revision", "base", "task", "prompt", "method", "adapter", "hardware", "library", "sent_by"):
        value = getattr(result, name)
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{name}: must be a text that says something, not {value!r}")
    for name, pattern, what in (
        ("revision", r"local|[0-9a-f]{40}", 'the 40 hexadecimal digits of a commit of the hub, or "local"'),
        ("base", r"[0-9a-f]{64}", "the 64 hexadecimal digits of base_fingerprint(model)"),
        ("commit", r"([0-9a-f]{40}(-dirty)?)?", "the 40 hexadecimal digits of a commit, or empty"),
    ):
        if not re.fullmatch(pattern, str(getattr(result, name))):
            raise ValueError(f"{name}: must be {what}, not {getattr(result, name)!r}")
    if result.method not in METHODS:
        raise ValueError(f"method: must be one of {', '.join(METHODS)}, not {result.method!r}")
    for name, least in (("parameters", 1), ("bits", 1), ("basis_bits", 0), ("seed", 0)):
        value = getattr(result, name)
        if type(value) is not int or value < least:
            raise ValueError(f"{name}: must be a whole number of at least {least}, not {value!r}")
    _number("seconds", result.seconds, 0, math.inf)
    if not isinstance(result.settings, dict) or result.settings.get("seed") != result.seed:
        raise ValueError("settings: must be those of training, with the seed of the record")
    for name in ("curve", "versions"):
        if not isinstance(getattr(result, name), dict):
            raise ValueError(f"{name}: must be a table of names and values")
    if not result.scores:
        raise ValueError("scores: there are none; the register keeps runs that were scored, and their base with them")
    seen = set()
    for score in result.scores:
        where = f"scores of {score.task} at temperature {score.temperature!r}"
        _number(f"{where}: temperature", score.temperature, 0, math.inf)
        _check_score(f"{where}: base", score.base)
        _check_score(f"{where}: adapted", score.adapted)
        if (score.task, score.temperature) in seen:
            raise ValueError(f"{where}: occur twice")
        seen.add((score.task, score.temperature))
        if not isinstance(score.comparison, dict) or score.comparison.get("n") != score.base["n"]:
            raise ValueError(f"{where}: the comparison is not of the {score.base['n']} problems of the base's score")
        if score.base["n"] != score.adapted["n"]:
            raise ValueError(f"{where}: base and adapted model must answer the same problems")


def _check_score(where: str, score: Mapping[str, float]) -> None:
    if not isinstance(score, Mapping):
        raise ValueError(f"{where}: must be a table of names and values, not {score!r}")
    for what, names in (
        ("unknown", score.keys() - {*SHARES, "n", "samples", "tokens"}),
        ("missing", set(REQUIRED) - score.keys()),
    ):
        if names:
            raise ValueError(f"{where}: {what} values: {', '.join(sorted(names))}")
    for name, value in score.items():
        if name in ("n", "samples"):
            if type(value) is not int or value < 1:
                raise ValueError(f"{where}: {name} must be a whole number of at least 1, not {value!r}")
        else:
            _number(f"{where}: {name}", value, 0, 1 if name in SHARES else math.inf)
    for mean, low, high in (("accuracy", "low", "high"), ("lenient", "lenient_low", "lenient_high")):
        if mean in score and not score.get(low, math.nan) <= score[mean] <= score.get(high, math.nan):
            raise ValueError(f"{where}: {mean} {score[mean]!r} does not lie within its interval")


def _number(where: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high or math.isinf(value):
        raise ValueError(f"{where} must be a number from {low:g} to {high:g}, not {value!r}")
