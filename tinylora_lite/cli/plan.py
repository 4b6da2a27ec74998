"""The TinyLoRA settings that train a budget of parameters on a model: u = 1, as little tying as the budget allows."""

from __future__ import annotations

import argparse

from tinylora_lite.cli import shared
from tinylora_lite.planning import shapes

EXAMPLE = "tinylora plan qwen2.5-7b --budget 13"
SEED_HELP = "of the random projections, carried into the settings"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``tinylora plan``."""
    parser.add_argument("model", metavar="MODEL", help=shapes.HELP)
    parser.add_argument("--budget", type=int, required=True, help="how many parameters may train at most")


def run(arguments: argparse.Namespace) -> None:
    """Prints the settings as a line of Python, or JSON."""
    from tinylora_lite.planning.counting import count_parameters, plan

    model, config = arguments.model, shapes.model_config(arguments.model)
    found = plan(config, arguments.budget, seed=arguments.seed)
    settings = {name: getattr(found, name) for name in ("rank", "u", "n_tie", "tying", "seed")}
    parameters = count_parameters(config, "tinylora", u=found.u, n_tie=found.n_tie, tying=found.tying)
    written = ", ".join(f"{name}={value!r}" for name, value in settings.items())
    shared.show(
        arguments,
        {"model": model, "budget": arguments.budget, "parameters": parameters, "settings": settings},
        f"{parameters} parameters on {model}, {2 * parameters} bytes as bfloat16:\ntl.TinyLoraConfig({written})",
    )
