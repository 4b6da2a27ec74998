"""Settings to start from: without a name, the list of them; with one, its settings file with a comment at every key.

Keep one with `tinylora preset NAME > settings.yaml`, change what you like, and `tinylora train settings.yaml`.
"""

from __future__ import annotations

import argparse
import json

from rich.console import Console
from rich.table import Table

from tinylora_lite.experiment.presets import BASES, CARDS, NANO, RECIPES, describe, preset, preset_names

HELP = "list the presets, or print one as a settings file"
EXAMPLE = "tinylora preset qwen2.5-7b/gsm8k --card h100 > settings.yaml"
SEED_HELP = "of training, written into the settings"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``tinylora preset``."""
    parser.add_argument("name", nargs="?", help="a preset; without it they are listed")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that differ")
    parser.add_argument("--card", help=f"one of {', '.join(CARDS)} (default: a100-80gb)")


def run(arguments: argparse.Namespace) -> None:
    """Prints names, or YAML, or JSON."""
    if arguments.name is None:
        if arguments.json:
            print(json.dumps({"presets": list(preset_names()), "cards": list(CARDS)}))
        else:
            Console().print(_table())
        return
    settings = preset(arguments.name, arguments.card).override(arguments.overrides)
    if arguments.seed:
        settings = settings.override([f"training.seed={arguments.seed}"])
    if arguments.json:
        print(json.dumps(settings.to_dict()))
    else:  # not by rich, which would wrap lines and colour them
        print(settings.to_yaml(describe(arguments.name, arguments.card)), end="")


def _table() -> Table:
    table = Table(title=f"Presets, for {', '.join(CARDS)}", title_justify="left")
    table.add_column("preset", no_wrap=True)
    table.add_column("model")
    for base in BASES:
        for recipe in RECIPES:
            table.add_row(f"{base}/{recipe}", BASES[base].hub)
    table.add_row(NANO[0], "the shipped base, on a CPU")
    table.caption = "each by GRPO; NAME/sft trains by imitation, NAME/calibrated on calibrated directions"
    return table
