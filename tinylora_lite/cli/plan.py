"""The TinyLoRA settings that spend a budget of numbers on a model: u = 1, and as little tying as the budget allows."""

from __future__ import annotations

import argparse
import json

from tinylora_lite.planning import models
from tinylora_lite.planning.counting import count_parameters, plan

HELP = "find the settings that spend a budget of numbers"
EXAMPLE = "tinylora plan qwen2.5-7b --budget 13"
SEED_HELP = "of the random projections, carried into the settings"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``tinylora plan``."""
    parser.add_argument("model", metavar="MODEL", help=models.HELP)
    parser.add_argument("--budget", type=int, required=True, help="how many numbers may train at most")


def run(arguments: argparse.Namespace) -> None:
    """Prints the settings as a line of Python, or JSON."""
    config = models.model_config(arguments.model)
    found = plan(config, arguments.budget, seed=arguments.seed)
    settings = {name: getattr(found, name) for name in ("rank", "u", "n_tie", "tying", "seed")}
    counted = {name: settings[name] for name in ("u", "n_tie", "tying")}
    parameters = count_parameters(config, "tinylora", **counted)
    if arguments.json:
        result = {"model": arguments.model, "budget": arguments.budget, "parameters": parameters, "settings": settings}
        print(json.dumps(result))
        return
    written = ", ".join(f"{name}={value!r}" for name, value in settings.items())
    print(f"{parameters} parameters on {arguments.model}, {2 * parameters} bytes as bfloat16:")
    print(f"tl.TinyLoraConfig({written})")
