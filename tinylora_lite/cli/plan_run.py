"""What a run will take, before it is paid for: memory on each GPU, whether it fits, steps, hours and money.

Read from shapes alone: no weight is loaded. Hours are a range, and what they suppose is said below them.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from tinylora_lite.cli import shared
from tinylora_lite.planning.gpus import GPUS

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from tinylora_lite.planning.plan import Plan
    from tinylora_lite.planning.run_time import Range

EXAMPLE = "tinylora plan-run qwen2.5-7b/gsm8k --gpu h100"
GIB = 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``tinylora plan-run``."""
    shared.add_settings_arguments(
        parser,
        f"one of {', '.join(GPUS)}, or cpu, of which memory is planned and no time (default: a100-80gb, or cpu "
        "for a preset that is made for one)",
    )
    parser.add_argument("--gpus", type=int, default=1, help="how many of them train (default: 1)")
    add, at_least = parser.add_argument, shared.at_least
    add("--length", type=at_least(1, float), help="mean tokens of a completion (default: the task's own)")
    add("--problems", type=at_least(1), help="training problems (default: those of the task)")
    add("--price", type=at_least(0.01, float), help="of one GPU for one hour; without it, no money is counted")


def run(arguments: argparse.Namespace) -> None:
    """Prints the plan as tables, or JSON."""
    from rich.text import Text

    from tinylora_lite.experiment import presets
    from tinylora_lite.planning.plan import gpus_that_fit, plan_run
    from tinylora_lite.planning.run_time import assumptions

    gpu = presets.gpu_name(arguments.gpu or ("cpu" if arguments.settings in presets.ON_CPU else "a100-80gb"))
    # A preset is made for one of three GPUs; for another one, the preset of the largest is planned.
    named = gpu if arguments.settings in presets.preset_names()[len(presets.ON_CPU) :] and gpu in presets.GPUS else None
    settings = shared.read_settings(arguments.settings, named, arguments.overrides)
    options = {name: getattr(arguments, name) for name in ("gpus", "length", "problems", "price")}
    plan = plan_run(settings, gpu, **options)
    words: list[RenderableType]
    if plan.fits and gpu == "cpu":
        words = [
            Text("It fits.", "bold"),
            Text("The time depends on this CPU; the first steps of a run tell it.", "dim"),
        ]
    elif plan.fits:
        supposed = "; ".join(assumptions(settings, plan.gpu, plan.time.length))
        words = [_time(plan), Text("It fits.", "bold"), Text(f"The time supposes: {supposed}.", "dim")]
    else:
        words = [Text(f"It does not fit: {problem}.", "red") for problem in plan.problems]
        if plan.advice:
            words.append(Text(f"It fits with: {' '.join(plan.advice)}", "bold"))
        else:
            fitting = ", ".join(gpus_that_fit(plan)) or "no GPU that is known"
            words.append(Text(f"No change makes it fit. As it is, it fits: {fitting}."))
    shared.show(arguments, plan.to_dict(), _memory(plan), *words)


def _memory(plan: Plan) -> Table:
    from rich import box

    settings, where = plan.settings, f"{plan.gpus} x {plan.gpu.name}" if plan.gpus > 1 else plan.gpu.name
    terms: list[tuple[str, str, float]] = [(term.name, term.phase, term.bytes) for term in plan.terms]
    for phase, needed in plan.peaks.items():
        mark = "" if needed <= plan.gpu.usable else "does not fit"
        terms.append((f"all of it, {'at' if phase == 'set-up' else 'while'} {phase}", mark, needed))
    kind = "GPU" if plan.gpu.matrix_rate else "CPU"
    terms += [(f"what the {kind} has for it", "", plan.gpu.usable)]
    rows = [{f"memory on each {kind}": name, "when": phase, "GiB": _gib(needed)} for name, phase, needed in terms]
    title = f"{settings.model}, {settings.task}, {settings.method}: {plan.parameters:,} parameters on {where}"
    table = shared.table(rows, title)
    table.box, table.rows[len(plan.terms) - 1].end_section = box.HORIZONTALS, True
    return table


def _time(plan: Plan) -> Table:
    time, runs = plan.time, len(plan.settings.sweep())
    sweep = f", {_range(time.hours * runs, 'hours')} for {runs} learning rates" if runs > 1 else ""
    lines = {
        "steps": f"{time.steps:,}, each of {time.tokens:,.0f} tokens and {time.flops / 1e12:,.1f} TFLOPs",
        "sampling": _range(time.sampling, "seconds a step"),
        "training": _range(time.training, "seconds a step"),
        "calibrating": _range(time.calibrating * (1 / 60), "minutes"),
        "evaluating": _range(time.evaluating * (1 / 60), "minutes"),
        "in all": f"{_range(time.hours, 'hours a run')}{sweep}",
    }
    if plan.cost is not None:
        lines["cost"] = f"{plan.cost[0]:,.2f} to {plan.cost[1]:,.2f} a run, at {plan.price:g} an hour and GPU"
    return shared.described(lines)


def _range(found: Range, unit: str) -> str | None:
    return f"{found.low:,.1f} to {found.high:,.1f} {unit}" if found.high else None


def _gib(count: float) -> str:
    return f"{count / GIB:,.2f}" if count >= GIB / 100 else f"{count / GIB:.1e}"
