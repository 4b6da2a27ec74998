"""Settings to start from: without a name, the list of them; with one, its settings file with a comment at every key.

Keep one with `tinylora preset NAME > settings.yaml`, change what you like, and `tinylora train settings.yaml`.
"""

from __future__ import annotations

import argparse

from tinylora_lite.cli import shared

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
        rows = [{"preset": name, "model": presets.preset(name).model} for name in presets.preset_names()]
        table = shared.table(rows, f"Presets, for {', '.join(presets.GPUS)}")
        table.caption = "NAME alone trains by GRPO, NAME/sft by imitation, NAME/calibrated on calibrated directions"
        shared.show(arguments, {"presets": presets.preset_names(), "gpus": presets.GPUS}, table)
        return
    seed = [f"training.seed={arguments.seed}"] if arguments.seed else []
    settings = presets.preset(arguments.name, arguments.gpu).override([*arguments.overrides, *seed])
    text = settings.to_yaml(presets.describe(arguments.name, arguments.gpu))
    shared.show(arguments, settings.to_dict(), text.removesuffix("\n"))
