"""Dataclasses from plain values, with errors that name the key and, where it is misspelt, the nearest one."""

from __future__ import annotations

import difflib
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


class SettingsError(ValueError):
    """A setting that cannot be; ``key`` names it, as ``adapter.rank``."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


def dataclass_of(cls: Any, values: Any, above: str) -> Any:
    """A dataclass from a mapping, every value of the type that its field declares."""
    if not isinstance(values, Mapping):
        what = above.removesuffix(".") or "the file"
        raise SettingsError(above.removesuffix("."), f"{what} must hold settings, key: value, not {values!r}")
    check_keys(values, [f.name for f in fields(cls)], above)
    hints, arguments = get_type_hints(cls), {}
    for f in fields(cls):
        key = f"{above}{f.name}"
        if f.name not in values:
            if f.default is MISSING and f.default_factory is MISSING:
                raise SettingsError(key, f"{key} is missing")
        elif is_dataclass(hints[f.name]):
            arguments[f.name] = dataclass_of(hints[f.name], values[f.name], f"{key}.")
        else:
            arguments[f.name] = _typed(values[f.name], hints[f.name], key)
    return cls(**arguments)


def _typed(value: Any, hint: Any, key: str) -> Any:
    choices = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for choice in choices:
        if get_origin(choice) is Literal and any(type(value) is type(c) and value == c for c in get_args(choice)):
            return value
        if get_origin(choice) is tuple and isinstance(value, (list, tuple)):
            return tuple(_typed(item, get_args(choice)[0], key) for item in value)
        if choice is float and type(value) in (int, float):
            return float(value)
        if get_origin(choice) is dict and isinstance(value, Mapping):
            return dict(value)
        if isinstance(choice, type) and type(value) is choice:  # True is an int too, hence no isinstance
            return value
    raise SettingsError(key, f"{key} must be {' or '.join(map(_in_words, choices))}, not {value!r}")


def _in_words(choice: Any) -> str:
    if get_origin(choice) is Literal:
        return " or ".join(str(c) for c in get_args(choice))
    if get_origin(choice) is tuple:
        return f"a list, each item {_in_words(get_args(choice)[0])}"
    if get_origin(choice) is dict:
        return "settings, key: value"
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    return words[choice]


def check_keys(values: Mapping[Any, Any], allowed: Sequence[str], above: str) -> None:
    """Raises :class:`SettingsError` at the first unknown key, which ``above`` (``"adapter."``) stands before."""
    for name in values:
        if name not in allowed:
            near = difflib.get_close_matches(str(name), allowed, n=1, cutoff=0.5)
            advice = f"did you mean {above}{near[0]}?" if near else f"there are: {', '.join(allowed)}"
            raise SettingsError(f"{above}{name}", f"unknown setting {above}{name}; {advice}")


def at_least(settings: Any, above: str, **least: int) -> None:
    """Raises :class:`SettingsError` where a field is no whole number, or less than its ``least``."""
    for name, smallest in least.items():
        value = getattr(settings, name)
        if type(value) is not int or value < smallest:
            raise SettingsError(
                f"{above}{name}", f"{name} must be a whole number of at least {smallest}, not {value!r}"
            )
