"""What ``export`` and ``inspect --base`` load: a base by its folder or by name, and the adapter on it."""

from __future__ import annotations

import argparse
import contextlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from tinylora_lite import nano
from tinylora_lite.adapter.adapter import TinyLoraAdapter
from tinylora_lite.files import adapter_file as files
from tinylora_lite.files.file_format import DTYPES, read_file
from tinylora_lite.files.peft import import_peft
from tinylora_lite.files.peft_format import read_settings
from tinylora_lite.view.progress import Progress

HELP = "the base: the folder of a transformers checkpoint, or nano for the one that comes with the library"

TORCH_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}


def add_file_arguments(parser: argparse.ArgumentParser) -> None:
    """The adapter and its basis, as every command that reads an adapter takes them."""
    parser.add_argument("file", metavar="FILE", type=Path, help="an adapter file, or a folder that PEFT wrote")
    parser.add_argument(
        "--basis",
        type=Path,
        help="of a calibrated adapter: its basis, or a folder with it (default: beside the file, or in the package)",
    )


def base_folder(name: str) -> Path:
    """The folder of a base that is named on the command line.

    Raises:
        FileNotFoundError: there is no such folder, or no checkpoint in it.
    """
    folder = Path(name)
    if name == "nano" and not folder.exists():
        return nano.CHECKPOINTS / nano.BASE
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no folder at {name}; a base is nano or the folder of a transformers checkpoint, "
            "such as `hf download` prints"
        )
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{name} holds no config.json; give the folder of a transformers checkpoint, or nano")
    return folder


class Adapted(NamedTuple):
    """A base and the adapter on it, together because the adapter alone keeps no model alive."""

    model: PreTrainedModel
    adapter: TinyLoraAdapter


def load_adapted(file: Path, folder: Path, basis: Path | None, progress: Progress) -> Adapted:
    """The base in the dtype in which the adapter was trained, and the adapter attached to it.

    Args:
        file: an adapter file of this library, or a folder with a TinyLoRA of PEFT, which names no dtype: the base
            comes in its checkpoint's then.
        folder: of the base.
        basis: as :func:`~tinylora_lite.load` takes it.
        progress: told what is being done.

    Raises:
        FileNotFoundError: there is no such adapter.
        AdapterFileError: the adapter is damaged, foreign, or made for another base.
        ValueError: the base cannot be loaded.
    """
    # Read before the base, which may take minutes.
    if file.is_dir():
        read_settings(file)
        trained_in = "auto"
    else:
        trained_in = str(read_file(file)[0].get("base_dtype"))
    progress.begin("loading the base")
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=TORCH_DTYPES.get(trained_in, "auto"), local_files_only=True
        ).eval()
    except Exception as error:  # transformers and what it is built on raise exceptions of many kinds
        raise ValueError(f"the base at {folder} cannot be loaded: {error}") from error
    progress.begin("attaching the adapter")
    return Adapted(model, import_peft(model, file) if file.is_dir() else files.load(model, file, basis))


@contextlib.contextmanager
def told_warnings() -> Iterator[list[str]]:
    """Warnings of the block as one line each on stderr, without the place in the code; and in the list, at the end."""
    told: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield told
    lines = (" ".join(str(each.message).split()) for each in caught if each.category is UserWarning)
    told.extend(dict.fromkeys(lines))  # what reads a file twice warns twice
    for line in told:
        print(f"warning: {line}", file=sys.stderr)
