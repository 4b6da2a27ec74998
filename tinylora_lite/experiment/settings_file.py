"""Settings as a YAML file: a mistake is one line that names key and line, and every key is written with its comment."""

from __future__ import annotations

import difflib
import io
import re
from collections.abc import Iterable, Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import YAMLError

COMMENT_COLUMN = 44
"""Where comments start, counted from 0, unless a line is longer."""


class SettingsError(ValueError):
    """A setting that cannot be; ``key`` names it, as ``adapter.rank``."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


class Settings(BaseModel):
    """A group of settings: unknown keys are refused, no type is converted, nothing changes later."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Settings from plain values. Raises ``SettingsError`` for what is wrong first."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise _first_mistake(error, cls) from error


def read(text: str) -> Any:
    """The plain values of a YAML 1.2 text, in which ``1e-4`` is a number. Raises ``ValueError`` if it is no YAML."""
    try:
        return YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f"line {mark.line + 1}: "
        raise ValueError(f"{where}{getattr(error, 'problem', None) or error}; this is no YAML") from error


def write(values: Mapping[str, Any], group: type[Settings], more: Mapping[str, str], header: str = "") -> str:
    """YAML, one key a line, below a header of comments.

    Every key has the description of its field in ``group`` as its comment, or, in a plain dictionary, that in ``more``.
    """
    yaml, text = YAML(), io.StringIO()
    yaml.version = (1, 1)  # what it quotes and how it writes floats, readers of YAML 1.2 understand too
    yaml.width = 10**6
    yaml.representer.add_representer(type(None), lambda r, _: r.represent_scalar("tag:yaml.org,2002:null", "null"))
    yaml.dump(_commented(values, group, more), text)
    body = text.getvalue().removeprefix("%YAML 1.1\n---\n")
    return "".join(f"# {line}".rstrip() + "\n" for line in header.splitlines()) + body


def unknown(key: str, known: Iterable[str]) -> SettingsError:
    """The error of a key that is none of its group's; it names the nearest."""
    above, dot, name = key.rpartition(".")
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    advice = f"did you mean {above}{dot}{near[0]}?" if near else f"there are: {', '.join(known)}"
    return SettingsError(key, f"unknown setting {key}; {advice}")


def _first_mistake(error: ValidationError, group: type[Settings]) -> SettingsError:
    """What pydantic found first, in one line; an unknown key before all else, since another may be missing by it."""
    errors = sorted(error.errors(), key=lambda found: found["type"] not in ("extra_forbidden", "invalid_key"))
    kind, path, value = errors[0]["type"], errors[0]["loc"], errors[0]["input"]
    names: list[str] = []
    for part in path:
        names.append(str(part))
        inner = _inner(group, str(part))
        if inner is None:  # what follows is an index, or pydantic's name of a type
            break
        group = inner
    key = ".".join(names)
    if kind in ("extra_forbidden", "invalid_key"):
        return unknown(key, group.model_fields)
    if kind == "missing":
        return SettingsError(key, f"{key} is missing")
    if kind in ("model_type", "dict_type"):
        return SettingsError(key, f"{key or 'the file'} must hold settings, key: value, not {value!r}")
    if kind == "value_error":
        cause: SettingsError = errors[0]["ctx"]["error"]
        return cause
    depth = len(names)
    wanted = " or ".join(dict.fromkeys(found["msg"] for found in errors if found["loc"][:depth] == path[:depth]))
    for theirs, ours in {r"\w+ should ": "", "a valid tuple": "a list", "a valid boolean": "true or false"}.items():
        wanted = re.sub(theirs, ours, wanted)
    return SettingsError(key, f"{key} should {wanted.replace('None', 'null')}, not {value!r}")


def line_of(key: str, text: str) -> str:
    """The line of a key in a text, or of the innermost group around it, as words to go into a message."""
    place, line = YAML().load(text), ""
    for name in key.split("."):
        if not isinstance(place, CommentedMap) or name not in place:
            break
        line, place = f", line {place.lc.key(name)[0] + 1}", place[name]
    return line


def _inner(group: type[Settings], name: str) -> type[Settings] | None:
    """The group that a setting of a group is; ``None`` where it is a value, or unknown."""
    inner = group.model_fields[name].annotation if name in group.model_fields else None
    return inner if isinstance(inner, type) and issubclass(inner, Settings) else None


def _commented(values: Mapping[str, Any], group: type[Settings] | None, more: Mapping[str, str]) -> CommentedMap:
    commented = CommentedMap()
    for name, value in values.items():
        comment = group.model_fields[name].description if group else more[name]
        if isinstance(value, Mapping):
            value = _commented(value, _inner(group, name) if group else None, more)
        elif isinstance(value, list):
            value = CommentedSeq(value)
            value.fa.set_flow_style()
        commented[name] = value
        commented.yaml_add_eol_comment(comment, name, column=COMMENT_COLUMN)
    return commented
