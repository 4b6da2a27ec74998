"""How many parameters each method trains on a model, without loading it."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from tinylora_lite.planning import shapes

if TYPE_CHECKING:
    from rich.table import Table

    from tinylora_lite.planning.counting import Method

EXAMPLE = "tinylora count qwen2.5-7b --method tinylora --u 1 --n-tie 16"
SEED_HELP = "taken by every command; no count depends on it"

ROWS: tuple[tuple[Method, dict[str, Any]], ...] = (
    ("full", {}),
    ("lora", {"rank": 64}),
    ("lora", {"rank": 8}),
    ("lora", {"rank": 1}),
    ("vera", {"rank": 256}),
    ("lora_xs", {"rank": 64}),
    ("lora_xs", {"rank": 8}),
    ("lora_xs", {"rank": 2}),
    ("tinylora", {"u": 1, "n_tie": 1, "tying": "tiled"}),
    ("tinylora", {"u": 1, "n_tie": 16, "tying": "tiled"}),
    ("tinylora", {"u": 1, "n_tie": "all", "tying": "tiled"}),
)
"""What is shown where no method is asked for."""

METHODS = tuple(dict.fromkeys(method for method, _ in ROWS))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``tinylora count``."""
    parser.add_argument("model", metavar="MODEL", help=shapes.HELP)
    parser.add_argument("--method", choices=METHODS, help="one method; all are shown without it")
    parser.add_argument("--rank", type=int, help="of lora, lora_xs and vera")
    parser.add_argument("--u", type=int, help="of tinylora: the length of one trainable vector (default: 1)")
    parser.add_argument(
        "--n-tie", type=_n_tie, help='of tinylora: how many modules share one vector, or "all" (default: 1)'
    )
    parser.add_argument(
        "--tying", choices=("tiled", "structured"), help="of tinylora: which modules share (default: tiled)"
    )


def run(arguments: argparse.Namespace) -> None:
    """Prints a table of all methods, one line for one method, or JSON."""
    from rich.console import Console

    from tinylora_lite.planning.counting import count_parameters

    config = shapes.model_config(arguments.model)
    rows: list[dict[str, Any]] = []
    for method, options in _asked(arguments):
        parameters = count_parameters(config, method, **options)
        rows.append({"method": method, "settings": options, "parameters": parameters, "bytes": 2 * parameters})
    if arguments.method is None:
        if arguments.json:
            print(json.dumps({"model": arguments.model, "methods": rows}))
        else:
            Console().print(_table(arguments.model, rows))
    elif arguments.json:
        print(json.dumps({"model": arguments.model} | rows[0]))
    else:
        (row,) = rows
        settings = f" ({_words(row['settings'])})" if row["settings"] else ""
        counted = f"{row['parameters']:,} parameters, {_size(row['bytes'])} as bfloat16"
        print(f"{arguments.model}, {row['method']}{settings}: {counted}")


def _asked(arguments: argparse.Namespace) -> tuple[tuple[Method, dict[str, Any]], ...]:
    """The methods to count and their settings, defaults included."""
    method: Method | None = arguments.method
    given = {name: getattr(arguments, name) for name in ("rank", "u", "n_tie", "tying")}
    given = {name: value for name, value in given.items() if value is not None}
    defaults: dict[str, Any] = {"u": 1, "n_tie": 1, "tying": "tiled"} if method == "tinylora" else {}
    takes = tuple(defaults) if method == "tinylora" else () if method in ("full", None) else ("rank",)
    for name in given:
        if name not in takes:
            wrong = "belongs to one method; say which with --method" if method is None else f"is no setting of {method}"
            raise ValueError(f"--{name.replace('_', '-')} {wrong}")
    if method is None:
        return ROWS
    if "rank" in takes and "rank" not in given:
        raise ValueError(f"{method} needs --rank")
    return ((method, defaults | given),)


def _table(model: str, rows: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    table = Table("method", "settings", "parameters", "as bfloat16", title=f"What trains on {model}")
    table.title_justify = "left"
    for column in table.columns[2:]:
        column.justify = "right"
    for row in rows:
        cells = (row["method"], _words(row["settings"]), f"{row['parameters']:,}", _size(row["bytes"]))
        table.add_row(*cells, style="bold" if row["method"] == "tinylora" else None)
    return table


def _words(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.items())


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count} B"
        count /= 1000
    return f"{count:.3g} GB"


def _n_tie(text: str) -> int | str:
    return text if text == "all" else int(text)
