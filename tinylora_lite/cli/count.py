"""How many numbers each method trains on a model, without loading it."""

from __future__ import annotations

import argparse
import json
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import PretrainedConfig

from tinylora_lite.planning import models
from tinylora_lite.planning.counting import Method, count_parameters

HELP = "count the numbers that a method trains on a model"
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
BYTES = 2
"""Of one number as bfloat16."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``tinylora count``."""
    parser.add_argument("model", metavar="MODEL", help=models.HELP)
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
    config = models.model_config(arguments.model)
    if arguments.method is None:
        for name in _given(arguments):
            raise ValueError(f"--{name.replace('_', '-')} belongs to one method; say which with --method")
        rows = [_row(config, method, options) for method, options in ROWS]
        if arguments.json:
            print(json.dumps({"model": arguments.model, "methods": rows}))
        else:
            Console().print(_table(arguments.model, rows))
        return
    row = _row(config, arguments.method, _options(arguments))
    if arguments.json:
        print(json.dumps({"model": arguments.model} | row))
    else:
        settings = f" ({_words(row['settings'])})" if row["settings"] else ""
        print(
            f"{arguments.model}, {row['method']}{settings}: {row['parameters']:,} parameters, "
            f"{_size(row['bytes'])} as bfloat16"
        )


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    given = {name: getattr(arguments, name) for name in ("rank", "u", "n_tie", "tying")}
    return {name: value for name, value in given.items() if value is not None}


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    given = _given(arguments)
    defaults: dict[str, Any] = {"u": 1, "n_tie": 1, "tying": "tiled"} if arguments.method == "tinylora" else {}
    takes = {"full": (), "tinylora": tuple(defaults)}.get(arguments.method, ("rank",))
    for name in given:
        if name not in takes:
            raise ValueError(f"--{name.replace('_', '-')} is no setting of {arguments.method}")
    if "rank" in takes and "rank" not in given:
        raise ValueError(f"{arguments.method} needs --rank")
    return defaults | given


def _row(config: PretrainedConfig, method: Method, options: dict[str, Any]) -> dict[str, Any]:
    parameters = count_parameters(config, method, **options)
    return {"method": method, "settings": options, "parameters": parameters, "bytes": BYTES * parameters}


def _table(model: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=f"What trains on {model}", title_justify="left")
    table.add_column("method")
    table.add_column("settings")
    table.add_column("parameters", justify="right")
    table.add_column("as bfloat16", justify="right")
    for row in rows:
        style = "bold" if row["method"] == "tinylora" else None
        cells = (row["method"], _words(row["settings"]), f"{row['parameters']:,}", _size(row["bytes"]))
        table.add_row(*cells, style=style)
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
