"""What several commands share: arguments, settings by name, the adapter and its base, warnings, and the output."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tinylora_lite as tl

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from transformers import PreTrainedModel

    from tinylora_lite.experiment.settings import RunSettings
    from tinylora_lite.view.progress import Progress

MODEL_HELP = "a name of `tinylora models`, the folder of a transformers checkpoint, a GGUF file, or a name on the hub"
BASE_HELP = "the base: a name of `tinylora models`, the folder of a transformers checkpoint, or a GGUF file"
BASIS_HELP = "of a calibrated adapter: its basis, or a folder with it (default: beside the file, or in the package)"
PRECISIONS = ("fp32", "fp16", "bf16")


def add_file_arguments(parser: argparse.ArgumentParser) -> None:
    """The adapter and its basis."""
    parser.add_argument("file", metavar="FILE", type=Path, help="an adapter file, or a folder that PEFT wrote")
    parser.add_argument("--basis", type=Path, help=BASIS_HELP)


def add_settings_arguments(parser: argparse.ArgumentParser, gpu_help: str) -> None:
    """A settings file or a preset, what differs from it, and a GPU."""
    parser.add_argument("settings", help="a settings file, or the name of a preset (`tinylora preset` lists them)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that differ: adapter.u=2, folder=x")
    parser.add_argument("--gpu", help=gpu_help)


def at_least(least: float, kind: Callable[[str], float] = int) -> Callable[[str], Any]:
    """The argparse type of a finite number with a lower bound."""

    def number(text: str) -> float:
        value = kind(text)
        if not least <= value < math.inf:
            raise argparse.ArgumentTypeError(f"must be at least {least}, not {text}")
        return value

    return number


def read_settings(name: str, gpu: str | None, overrides: list[str], seed: int = 0) -> RunSettings:
    """A settings file, or a preset by its name; a seed other than 0 replaces that of training."""
    from tinylora_lite.experiment.presets import preset
    from tinylora_lite.experiment.settings import load_settings

    overrides = [*overrides, f"training.seed={seed}"] if seed else overrides
    if Path(name).suffix not in (".yaml", ".yml") and not Path(name).is_file():
        return preset(name, gpu).override(overrides)
    if gpu is not None:
        raise ValueError("--gpu chooses among presets; a settings file says everything itself")
    return load_settings(name, overrides)


def base_folder(name: str, dtype: str) -> Path:
    """The folder of a base that the command line names, and of a GGUF file its checkpoint in ``dtype``."""
    from tinylora_lite.experiment.models import checkpoint

    folder = Path(checkpoint(name, dtype))
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no folder at {name}; a base is a name of `tinylora models`, a GGUF file or the folder of a checkpoint, "
            "such as `hf download` prints"
        )
    return folder


def trained_with(file: Path) -> tuple[str, int]:
    """The dtype of the base that an adapter was trained on, ``"auto"`` if it names none, and the adapter's rank."""
    from tinylora_lite.experiment.models import DTYPES
    from tinylora_lite.files.file_format import read_file
    from tinylora_lite.files.peft_format import read_settings

    if file.is_dir():
        return "auto", read_settings(file).r
    header = read_file(file)[0]
    dtype, settings = str(header.get("base_dtype")), header.get("settings") or {}
    return dtype if dtype in DTYPES else "auto", int(settings.get("rank", 2))


def attach_file(model: PreTrainedModel, file: Path, basis: Path | None) -> tl.TinyLoraAdapter:
    """The adapter of a file of this library, or of a folder with PEFT's TinyLoRA, on its base."""
    return tl.import_peft(model, file) if file.is_dir() else tl.load(model, file, basis)


def load_adapted(
    file: Path, base: str, basis: Path | None, progress: Progress
) -> tuple[PreTrainedModel, tl.TinyLoraAdapter]:
    """The base on the CPU, in the dtype of the adapter's training, and the adapter, which does not keep it alive."""
    from tinylora_lite.experiment.models import load_model

    dtype, _ = trained_with(file)  # before the base, which may take minutes
    progress.begin("loading the base")
    model = load_model(base, dtype=dtype, device="cpu")
    progress.begin("attaching the adapter")
    return model, attach_file(model, file, basis)


@contextlib.contextmanager
def told_warnings() -> Iterator[None]:
    """Warnings of the block as one line each on stderr, without their place in the code."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    lines = (" ".join(str(each.message).split()) for each in caught if each.category is UserWarning)
    for line in dict.fromkeys(lines):  # a file that is read twice warns twice
        print(f"warning: {line}", file=sys.stderr)


def command_progress(console: Console | None = None, plain: bool = False) -> Progress:
    """The progress of a command, on stderr unless a console is given; the bars of transformers are off."""
    from rich.console import Console
    from transformers.utils import logging

    from tinylora_lite.view.progress import progress_for

    logging.disable_progress_bar()
    return progress_for(console or Console(stderr=True), plain)


def results(progress: Progress) -> list[RenderableType]:
    """What stays on the terminal of a progress that ended: the curves of a live display, and the scores."""
    from tinylora_lite.view.progress import LiveProgress, score_table

    if isinstance(progress, LiveProgress):
        return [progress]
    return [score_table(progress.scores)] if progress.scores else []


def described(values: Mapping[str, Any]) -> Table:
    """A line for each entry of a result that there is, under its name in the JSON."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in values.items():
        if value not in (None, []):
            table.add_row(name.replace("_", " "), Text(_text(value)))
    return table


def table(rows: Sequence[Mapping[str, Any]], title: str = "") -> Table:
    """A line for each row, under the names of its entries; what begins with a digit is to the right."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    cells = [{name: _text(value) for name, value in row.items()} for row in rows]
    numbers = {name for row in cells for name, text in row.items() if text.lstrip("-")[:1].isdigit()}
    found = Table(title=Text(title) if title else None, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in next(iter(rows), ()):
        found.add_column(name, justify="right" if name in numbers else "left", overflow="fold")
    for row in cells:
        found.add_row(*map(Text, row.values()))  # a text with square brackets is no markup
    return found


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={_text(each)}" for name, each in value.items() if each is not None)
    if isinstance(value, list):
        return " ".join(map(_text, value[:8])) + (f" and {len(value) - 8:,} more" if len(value) > 8 else "")
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return format(value, "," if isinstance(value, int) else ".4g")
    return "" if value is None else str(value)


def show(arguments: argparse.Namespace, result: Any, *words: RenderableType) -> None:
    """Prints the result of a command as JSON where ``--json`` asks for it, and otherwise in words."""
    if arguments.json:
        print(json.dumps(result, default=str))  # paths as text
        return
    from rich.console import Console

    for part in words:
        if isinstance(part, str):
            print(part)  # rich would wrap and colour it
        else:
            Console().print(part)
