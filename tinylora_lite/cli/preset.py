"""Settings to start from: without a name, the list of them; with one, its settings file with a comment at every key.

Keep one with `tinylora preset NAME > settings.yaml`, change what you like, and `tinylora train settings.yaml`.
"""

from __future__ import annotations

import argparse
import json

EXAMPLE = "tinylora preset qwen2.5-7b/gsm8k --gpu h100 > settings.yaml"
SEED_HELP = "of training, written into the settings"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``tinylora preset``."""
    parser.add_argument("name", nargs="?", help="a preset; without it they are listed")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that differ")
    parser.add_argument("--gpu", help="t4, a100-80gb or h100 (default: a100-80gb)")


def run(arguments: argparse.Namespace) -> None:
    """Prints names, or YAML, or JSON."""
    from tinylora_lite.experiment import presets

    if arguments.name is None:
        _list(arguments.json)
        return
    settings = presets.preset(arguments.name, arguments.gpu).override(arguments.overrides)
    if arguments.seed:
        settings = settings.override([f"training.seed={arguments.seed}"])
    if arguments.json:
        print(json.dumps(settings.to_dict()))
    else:  # not by rich, which would wrap lines and colour them
        print(settings.to_yaml(presets.describe(arguments.name, arguments.gpu)), end="")


def _list(as_json: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from tinylora_lite.experiment.presets import BASES, GPUS, NANO, RECIPES, preset_names

    if as_json:
        print(json.dumps({"presets": list(preset_names()), "gpus": list(GPUS)}))
        return
    table = Table("preset", "model", title=f"Presets, for {', '.join(GPUS)}", title_justify="left")
    table.columns[0].no_wrap = True
    for base, found in BASES.items():
        for recipe in RECIPES:
            table.add_row(f"{base}/{recipe}", found.hub)
    table.add_row(NANO[0], "the shipped base, on a CPU")
    table.caption = "each by GRPO; NAME/sft trains by imitation, NAME/calibrated on calibrated directions"
    Console().print(table)
