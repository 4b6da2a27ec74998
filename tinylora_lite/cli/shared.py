"""What several commands share: the arguments of an adapter, its base, warnings in one line, the end of a display."""

from __future__ import annotations

import argparse
import contextlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import tinylora_lite as tl

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel

    from tinylora_lite.view.progress import Progress

BASE_HELP = "the base: the folder of a transformers checkpoint, or nano for the one that comes with the library"
BASIS_HELP = "of a calibrated adapter: its basis, or a folder with it (default: beside the file, or in the package)"
PRECISIONS = ("fp32", "fp16", "bf16")


def add_file_arguments(parser: argparse.ArgumentParser) -> None:
    """The adapter and its basis."""
    parser.add_argument("file", metavar="FILE", type=Path, help="an adapter file, or a folder that PEFT wrote")
    parser.add_argument("--basis", type=Path, help=BASIS_HELP)


def base_folder(name: str) -> Path:
    """The folder of a base that the command line names. Raises ``FileNotFoundError`` if there is none."""
    from tinylora_lite.experiment.models import checkpoint

    folder = Path(checkpoint(name))
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no folder at {name}; a base is nano or the folder of a transformers checkpoint, "
            "such as `hf download` prints"
        )
    return folder


def trained_with(file: Path) -> tuple[str, int]:
    """The dtype of the base that an adapter was trained on, ``"auto"`` if it names none, and the adapter's rank.

    Raises:
        FileNotFoundError: there is no such adapter.
        AdapterFileError: it is damaged or foreign.
    """
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
    file: Path, folder: Path, basis: Path | None, progress: Progress
) -> tuple[PreTrainedModel, tl.TinyLoraAdapter]:
    """The base in the dtype in which the adapter was trained, on the CPU, and the adapter attached to it.

    Keep both: the adapter alone does not keep the model alive.

    Args:
        file: an adapter file of this library, or a folder with PEFT's TinyLoRA.
        folder: of the base.
        basis: as :func:`~tinylora_lite.load` takes it.
        progress: told what is being done.

    Raises:
        OSError: there is no such adapter, or the base cannot be loaded.
        AdapterFileError: the adapter is damaged, foreign, or made for another base.
    """
    from transformers.utils import logging

    from tinylora_lite.experiment.models import load_model

    dtype, _ = trained_with(file)  # before the base, which may take minutes
    logging.disable_progress_bar()
    progress.begin("loading the base")
    model = load_model(str(folder), dtype=dtype, device="cpu")
    progress.begin("attaching the adapter")
    return model, attach_file(model, file, basis)


@contextlib.contextmanager
def told_warnings() -> Iterator[list[str]]:
    """Warnings of the block as one line each on stderr, without their place in the code; in the list at the end."""
    told: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield told
    lines = (" ".join(str(each.message).split()) for each in caught if each.category is UserWarning)
    told.extend(dict.fromkeys(lines))  # a file that is read twice warns twice
    for line in told:
        print(f"warning: {line}", file=sys.stderr)


def show_results(console: Console, progress: Progress) -> None:
    """Leaves the curves and scores of a live display on the terminal, or the scores alone."""
    from tinylora_lite.view.progress import LiveProgress, score_table

    if isinstance(progress, LiveProgress):
        console.print(progress)
    elif progress.scores:
        console.print(score_table(progress.scores))
