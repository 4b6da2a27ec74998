"""How many parameters each method trains on a model, without loading it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from tinylora_lite.cli import shared
from tinylora_lite.planning import shapes

if TYPE_CHECKING:
    from tinylora_lite.planning.counting import Method

EXAMPLE = "tinylora count qwen2.5-7b --method tinylora --u 1 --n-tie 16"

TINYLORA: dict[str, Any] = {"u": 1, "n_tie": 1, "tying": "tiled"}
ROWS: tuple[tuple[Method, dict[str, Any]], ...] = (
    ("full", {}),
    ("lora", {"rank": 64}),
    ("lora", {"rank": 8}),
    ("lora", {"rank": 1}),
    ("vera", {"rank": 256}),
    ("lora_xs", {"rank": 64}),
    ("lora_xs", {"rank": 8}),
    ("lora_xs", {"rank": 2}),
    ("tinylora", TINYLORA),
    ("tinylora", TINYLORA | {"n_tie": 16}),
    ("tinylora", TINYLORA | {"n_tie": "all"}),
)
"""What is shown where no method is asked for."""

SETTINGS = {method: tuple(settings) for method, settings in ROWS}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``tinylora count``."""
    add = parser.add_argument
    add("model", metavar="MODEL", help=shapes.HELP)
    add("--method", choices=tuple(SETTINGS), help="one method; all are shown without it")
    add("--rank", type=int, help="of lora, lora_xs and vera")
    add("--u", type=int, help="of tinylora: the length of one trainable vector (default: 1)")
    add("--n-tie", type=_n_tie, help='of tinylora: how many modules share one vector, or "all" (default: 1)')
    add("--tying", choices=("tiled", "structured"), help="of tinylora: which modules share (default: tiled)")


def run(arguments: argparse.Namespace) -> None:
    """Prints a table of all methods, one line for one method, or JSON."""
    from rich.filesize import decimal

    from tinylora_lite.planning.counting import count_parameters

    model, config = arguments.model, shapes.model_config(arguments.model)
    rows, sizes = [], []
    for method, settings in _asked(arguments):
        parameters = count_parameters(config, method, **settings)
        sizes.append(decimal(2 * parameters, precision=2))
        rows.append({"method": method, "settings": settings, "parameters": parameters, "bytes": 2 * parameters})
    if arguments.method is None:
        cells = [row | {"bytes": size} for row, size in zip(rows, sizes, strict=True)]
        table = shared.table(cells, f"What trains on {model}, and its size as bfloat16")
        shared.show(arguments, {"model": model, "methods": rows}, table)
    else:
        words = ", ".join(f"{key}={value}" for key, value in settings.items())
        line = f"{model}, {method}{f' ({words})' if words else ''}: {parameters:,} parameters"
        shared.show(arguments, {"model": model} | rows[0], f"{line}, {sizes[0]} as bfloat16")


def _asked(arguments: argparse.Namespace) -> tuple[tuple[Method, dict[str, Any]], ...]:
    """The methods to count and their settings, defaults included."""
    method: Method | None = arguments.method
    given = {name: getattr(arguments, name) for name in ("rank", "u", "n_tie", "tying")}
    given = {name: value for name, value in given.items() if value is not None}
    for name in given:
        if method is None or name not in SETTINGS[method]:
            of = method or "all methods; choose one with --method"
            raise ValueError(f"--{name.replace('_', '-')} is no setting of {of}")
    if method is None:
        return ROWS
    return ((method, (TINYLORA if method == "tinylora" else {}) | given),)


def _n_tie(text: str) -> int | str:
    if text != "all" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f'must be an integer or "all", not {text}')
    return text if text == "all" else int(text)
