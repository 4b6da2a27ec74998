"""Make a basis of calibrated directions: policy gradients of a few hundred problems, in one pass or two.

The basis is made once for a base and a task, and shared; adapters on it hold only their parameters. This is the
project's own method: the paper draws its directions at random.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from tinylora_lite.cli import shared

EXAMPLE = "tinylora calibrate nano --task nano --directions 13 --out basis.safetensors"
SEED_HELP = "of the choice of problems and of the sampling"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``tinylora calibrate``."""
    add = parser.add_argument
    add("model", metavar="MODEL", help=shared.MODEL_HELP)
    add("--task", required=True, help="whose training problems are used: gsm8k, math, nano, ...")
    add("--data", help="folder to read the task from (default: the hub)")
    add("--rank", type=int, default=8, help="r of the adapters that will use it (default: 8)")
    add("--directions", type=int, default=13, help="how many to keep (default: 13)")
    add("--problems", type=int, default=256, help="to take gradients on (default: 256)")
    add("--group-size", type=int, default=8, help="completions of each (default: 8)")
    add("--looks", type=int, default=2, choices=(1, 2), help="passes; the second is further on (default: 2)")
    add("--max-new-tokens", type=int, default=1024, help="of a completion (default: 1024)")
    add("--micro-batch", type=int, default=8, help="completions in one backward pass (default: 8)")
    add("--checkpointing", action="store_true", help="recompute activations: far less memory, slower")
    dtypes = "of the model (default: bfloat16, of nano and GGUF files float32)"
    add("--dtype", choices=("bfloat16", "float16", "float32"), help=dtypes)
    add("--revision", help="commit of the model on the hub")
    add("--out", type=Path, default=Path("basis.safetensors"), help="default: basis.safetensors")


def run(arguments: argparse.Namespace) -> None:
    """Calibrates and writes the basis; prints where it is and how many problems informed it, or JSON."""
    from tinylora_lite.experiment.models import load_tokenizer, own_dtype
    from tinylora_lite.experiment.run import task_named
    from tinylora_lite.experiment.runner import Runner
    from tinylora_lite.experiment.settings import RunSettings

    a, started = arguments, time.perf_counter()
    values = {name: getattr(a, name) for name in ("model", "task", "data", "revision")}
    default = "float32" if own_dtype(a.model, "auto", a.revision) == "float32" else "bfloat16"
    values |= {"dtype": a.dtype or default, "gradient_checkpointing": a.checkpointing}
    values["adapter"] = {"projection": "calibrated", "u": a.directions, "calibration": {"problems": a.problems}}
    settings = RunSettings.from_dict(values)
    task = task_named(a.task, settings)
    names = ("rank", "directions", "seed", "problems", "group_size", "max_new_tokens", "micro_batch")
    with shared.command_progress() as progress:
        runner = Runner.open(settings, load_tokenizer(a.model, a.revision), progress)
        basis = runner.calibrate(task, a.out, passes=a.looks, **{name: getattr(a, name) for name in names})
    result = {
        "file": a.out,
        "bytes": a.out.stat().st_size,
        "fingerprint": basis.fingerprint(),
        "rank": basis.rank,
        "directions": len(basis.directions),
        **{name: basis.provenance[name] for name in ("problems", "informative", "spectrum")},
        "seconds": round(time.perf_counter() - started, 1),
    }
    shared.show(a, result, shared.described({name: result[name] for name in result if name != "spectrum"}))
