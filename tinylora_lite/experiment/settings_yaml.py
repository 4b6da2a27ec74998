"""Settings as YAML: read with the line of every key, written with a comment beside every key."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

COMMENT_COLUMN = 44
"""Where comments start, counted from 0, unless a line is longer."""


def read(text: str) -> tuple[Any, dict[str, int]]:
    """What a YAML text holds, and the line (from 1) on which each key stands, keys inside keys as ``outer.inner``.

    Numbers such as ``1e-4`` are numbers here, as YAML 1.2 has it, and not strings, as PyYAML reads them.

    Raises:
        ValueError: the text is no YAML, holds more than one document, or names a key twice.
        ImportError: PyYAML is missing.
    """
    yaml = _yaml()

    class Loader(yaml.SafeLoader):  # type: ignore[misc, name-defined]
        """The safe loader with YAML 1.2's floats."""

    numbers = Loader.yaml_implicit_resolvers.copy()
    Loader.yaml_implicit_resolvers = {first: list(found) for first, found in numbers.items()}
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _float_pattern(), list("-+.0123456789"))
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        lines: dict[str, int] = {}
        if node is not None:
            _number_lines(yaml, node, "", lines)
        return (None if node is None else loader.construct_document(node)), lines
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f"line {mark.line + 1}: "
        raise ValueError(f"{where}{getattr(error, 'problem', None) or error}; this is no YAML") from error


def read_value(text: str) -> Any:
    """One value as a settings file would hold it: ``1e-4`` is a number, ``null`` is ``None``, ``[1, 2]`` a list.

    Raises:
        ValueError: it is no YAML.
    """
    return read(text)[0]


def write(values: Mapping[str, Any], comments: Mapping[str, str], header: str = "") -> str:
    """YAML of nested mappings, one key a line, each with its comment.

    Args:
        values: mappings, lists of plain values, and plain values.
        comments: by key, keys inside keys as ``outer.inner``.
        header: lines of text that stand above as comments.

    >>> print(write({"adapter": {"rank": 2}}, {"adapter.rank": "r"}).replace(" " * 20, " "), end="")
    adapter:
      rank: 2             # r
    """
    lines = [f"# {line}".rstrip() for line in header.splitlines()]
    _write(values, comments, "", lines)
    return "\n".join(lines) + "\n"


def write_file(text: str, path: str | Path) -> Path:
    """Writes a text; the file appears whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    return temporary.replace(path)


def _write(values: Mapping[str, Any], comments: Mapping[str, str], above: str, lines: list[str]) -> None:
    indent = "  " * (above.count(".") if above else 0)
    for name, value in values.items():
        key = f"{above}{name}"
        nested = isinstance(value, Mapping) and bool(value)
        line = f"{indent}{name}:" if nested else f"{indent}{name}: {_scalar(value)}"
        comment = comments.get(key)
        lines.append(f"{line:<{COMMENT_COLUMN - 2}}  # {comment}" if comment else line)
        if nested:
            _write(value, comments, f"{key}.", lines)


def _scalar(value: Any) -> str:
    text: str = _yaml().safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...").strip()


def _number_lines(yaml: ModuleType, node: Any, above: str, lines: dict[str, int]) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    for name, value in node.value:
        if not isinstance(name.value, Hashable):
            continue
        key = f"{above}{name.value}"
        if key in lines:
            raise ValueError(f"line {name.start_mark.line + 1}: {key} stands here and on line {lines[key]}")
        lines[key] = name.start_mark.line + 1
        _number_lines(yaml, value, f"{key}.", lines)


def _float_pattern() -> Any:
    import re

    return re.compile(r"^[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$")


def _yaml() -> ModuleType:
    try:
        import yaml
    except ImportError as error:
        raise ImportError('settings files need PyYAML; pip install "tinylora_lite[train]" brings it') from error
    module: ModuleType = yaml
    return module
