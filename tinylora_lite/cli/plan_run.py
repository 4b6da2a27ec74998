"""What a run will take, before it is paid for: memory on each card, whether it fits, steps, hours and money.

Read from shapes alone: no weight is loaded. Hours are a range, and what they suppose is said below them.
"""

from __future__ import annotations

import argparse
import json

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from tinylora_lite.cli.train import read
from tinylora_lite.experiment.presets import CARDS as PRESET_CARDS
from tinylora_lite.planning.gpus import CARDS
from tinylora_lite.planning.plan import Plan, assumptions, cards_that_fit, plan_run

HELP = "say what memory and time a run will take"
EXAMPLE = "tinylora plan-run qwen2.5-7b/gsm8k --card h100"
SEED_HELP = "taken by every command; no plan depends on it"
GIB = 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``tinylora plan-run``."""
    parser.add_argument("settings", help="a settings file, or the name of a preset (`tinylora preset` lists them)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that differ, as in tinylora train")
    parser.add_argument("--card", default="a100-80gb", help=f"one of {', '.join(CARDS)} (default: a100-80gb)")
    parser.add_argument("--gpus", type=int, default=1, help="how many of them train (default: 1)")
    parser.add_argument("--length", type=float, help="mean tokens of a completion (default: the task's own)")
    parser.add_argument("--problems", type=int, help="training problems (default: those of the task)")
    parser.add_argument("--price", type=float, help="of one card for one hour; without it, no money is counted")


def run(arguments: argparse.Namespace) -> None:
    """Prints the plan as tables, or JSON."""
    card = arguments.card.lower()
    # A preset is made for one of three cards; on another one the settings of the largest are looked at.
    named = card if not arguments.settings.startswith("nano") and card in PRESET_CARDS else None
    is_file = arguments.settings.endswith((".yaml", ".yml"))
    settings = read(arguments.settings, None if is_file else named, arguments.overrides)
    plan = plan_run(
        settings,
        card,
        gpus=arguments.gpus,
        length=arguments.length,
        problems=arguments.problems,
        price=arguments.price,
    )
    if arguments.json:
        print(json.dumps(plan.to_dict()))
        return
    console = Console()
    console.print(report(plan))
    if not plan.fits and not plan.advice:
        cards = cards_that_fit(settings, gpus=arguments.gpus)
        console.print(f"No change makes it fit. As it stands it fits: {', '.join(cards) or 'no card that is known'}.")


def report(plan: Plan) -> Group:
    """The plan as a person reads it."""
    settings = plan.settings
    cards = f"{plan.gpus} x {plan.card.name}" if plan.gpus > 1 else plan.card.name
    title = f"{settings.model}, {settings.task}, {settings.method}: {plan.numbers:,} numbers on {cards}"
    memory = Table(title=title, title_justify="left")
    memory.add_column("memory on each card")
    memory.add_column("when")
    memory.add_column("GiB", justify="right")
    for term in plan.terms:
        memory.add_row(term.name, term.phase, _gib(term.bytes))
    memory.add_section()
    for phase, needed in plan.peaks.items():
        fits = needed <= plan.capacity
        style = "bold" if fits else "bold red"
        memory.add_row(
            f"all of it, while {phase}" if phase != "set-up" else "all of it, at set-up", "", _gib(needed), style=style
        )
    memory.add_row("what the card has for it", "", _gib(plan.capacity))

    time = plan.time
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_row("steps", f"{time.steps:,}, each of {time.tokens:,.0f} tokens and {time.flops / 1e12:,.1f} TFLOPs")
    table.add_row("sampling", f"{time.sampling.low:,.1f} to {time.sampling.high:,.1f} seconds a step")
    table.add_row("training", f"{time.training.low:,.1f} to {time.training.high:,.1f} seconds a step")
    if time.calibrating.high:
        table.add_row("calibrating", f"{time.calibrating.low / 60:,.1f} to {time.calibrating.high / 60:,.1f} minutes")
    if time.evaluating.high:
        table.add_row("evaluating", f"{time.evaluating.low / 60:,.1f} to {time.evaluating.high / 60:,.1f} minutes")
    table.add_row("in all", f"{time.hours.low:,.1f} to {time.hours.high:,.1f} hours a run")
    runs = len(settings.sweep())
    if runs > 1:
        table.add_row(
            "", f"{runs * time.hours.low:,.1f} to {runs * time.hours.high:,.1f} hours for {runs} learning rates"
        )
    if plan.cost is not None:
        table.add_row("cost", f"{plan.cost[0]:,.2f} to {plan.cost[1]:,.2f} a run, at {plan.price:g} an hour and card")
    if plan.fits:
        supposed = Text("The time supposes: " + "; ".join(assumptions(plan)) + ".", "dim")
        return Group(memory, table, Text("It fits.", "bold"), supposed)
    refused = [Text(f"It does not fit: {problem}.", "red") for problem in plan.problems]
    advice = [Text(f"It fits with: {' '.join(plan.advice)}", "bold")] if plan.advice else []
    return Group(memory, *refused, *advice)


def _gib(count: float) -> str:
    return f"{count / GIB:,.2f}" if count >= GIB / 100 else f"{count / GIB:.1e}"
