"""Make a basis of calibrated directions: policy gradients of a few hundred problems, in one pass.

The basis is made once for a base and a task, and shared; adapters on it hold only their numbers. This is the project's
own method: the paper draws its directions at random.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from tinylora_lite.utils.progress import progress_bar

HELP = "make a basis of directions from policy gradients"
EXAMPLE = "tinylora calibrate nano --task nano --directions 13 --out basis.safetensors"
SEED_HELP = "of the choice of problems and of the sampling"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``tinylora calibrate``."""
    parser.add_argument("model", metavar="MODEL", help="a folder, a name on the hub, or nano")
    parser.add_argument("--task", required=True, help="whose training problems are used: gsm8k, math, nano, ...")
    parser.add_argument("--data", help="folder to read the task from (default: the hub)")
    parser.add_argument("--rank", type=int, default=8, help="r of the adapters that will use it (default: 8)")
    parser.add_argument("--directions", type=int, default=13, help="how many to keep (default: 13)")
    parser.add_argument("--problems", type=int, default=256, help="to take gradients on (default: 256)")
    parser.add_argument("--group-size", type=int, default=8, help="completions of each (default: 8)")
    parser.add_argument("--looks", type=int, default=2, choices=(1, 2), help="2 looks again further on (default: 2)")
    parser.add_argument("--max-new-tokens", type=int, default=1024, help="of a completion (default: 1024)")
    parser.add_argument("--micro-batch", type=int, default=8, help="completions in one backward pass (default: 8)")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations: far less memory, slower")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--revision", help="commit of the model on the hub")
    parser.add_argument("--out", type=Path, default=Path("basis.safetensors"), help="default: basis.safetensors")


def run(arguments: argparse.Namespace) -> None:
    """Calibrates and writes the basis; prints where it is and how much of the gradients it holds, or JSON."""
    from transformers.utils import logging

    from tinylora_lite.adapter.basis import save_basis
    from tinylora_lite.experiment.models import load_model
    from tinylora_lite.experiment.run import task_named
    from tinylora_lite.experiment.settings import RunSettings
    from tinylora_lite.training.calibrate import calibrate

    logging.disable_progress_bar()
    started = time.perf_counter()
    if not arguments.out.absolute().parent.is_dir():  # before an hour of work, not after it
        raise FileNotFoundError(f"there is no folder {arguments.out.absolute().parent} to write to")
    task = task_named(arguments.task, RunSettings(arguments.model, arguments.task, data=arguments.data))
    dtype = "float32" if arguments.model == "nano" else arguments.dtype
    model, tokenizer = load_model(arguments.model, dtype=dtype, revision=arguments.revision)
    if arguments.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with progress_bar("calibrating", arguments.problems) as advance:
        done = 0

        def progress(now: int, _total: int) -> None:
            nonlocal done
            for _ in range(now - done):
                advance("")
            done = now

        basis = calibrate(
            model,
            tokenizer,
            task,
            rank=arguments.rank,
            directions=arguments.directions,
            seed=arguments.seed,
            problems=arguments.problems,
            group_size=arguments.group_size,
            passes=arguments.looks,
            max_new_tokens=arguments.max_new_tokens,
            micro_batch=arguments.micro_batch,
            progress=progress,
        )
    save_basis(basis, arguments.out)
    found = basis.provenance
    result = {
        "file": str(arguments.out),
        "bytes": arguments.out.stat().st_size,
        "fingerprint": basis.fingerprint(),
        "rank": basis.rank,
        "directions": len(basis.directions),
        "problems": found["problems"],
        "informative": found["informative"],
        "spectrum": found["spectrum"],
        "seconds": round(time.perf_counter() - started, 1),
    }
    if arguments.json:
        print(json.dumps(result))
        return
    print(
        f"{result['directions']} directions of rank {result['rank']} from {result['informative']} of "
        f"{result['problems']} problems, {result['bytes']:,} bytes, {result['seconds']:.0f} seconds:\n"
        f"{arguments.out.resolve()}"
    )
