"""The same training by our loop and by TRL, with three samplers: the record is ``book/results/trl.json``.

    python -m benchmarks.trl_runs      # our loop and TRL, the model that trains being the sampler; about 10 minutes
    .venv-vllm/bin/python -m benchmarks.trl_runs --ways own-vllm trl-vllm      # vLLM with the adapter as a LoRA

Thirteen numbers in calibrated directions on the nano base, 30 steps of 32 prompts by 8 completions, three seeds. What
differs between ``own`` and ``trl-sampler`` is rounding alone, which turns a token over after some steps; what differs
between the others is who draws.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

import tinylora_lite as tl
from tinylora_lite import nano
from tinylora_lite.sampling.rollouts import Sampler
from tinylora_lite.sampling.sampler import ModelSampler

RECORD = Path(__file__).parents[1] / "book" / "results" / "trl.json"
SETTINGS: dict[str, Any] = {
    "steps": 30,
    "prompts_per_step": 32,
    "group_size": 8,
    "max_new_tokens": nano.MAX_NEW_TOKENS,
    "learning_rate": 0.2,
    "micro_batch": 64,
}
PROBLEMS = 500

Model = Any
"""A model of transformers and its tokenizer come as :func:`~tinylora_lite.nano.load` gives them."""


@cache
def vllm_sampler() -> Sampler:
    """One engine for all seeds: it follows whichever adapter it is given."""
    from tinylora_lite.sampling.vllm import VllmSampler

    _, tokenizer = nano.load()
    base = nano.CHECKPOINTS / nano.BASE
    return VllmSampler(base, tokenizer, sync="lora", dtype="float32", max_model_len=256, enable_chunked_prefill=False)


WAYS: dict[str, tuple[str, Callable[[Model, Any], Sampler | None]]] = {
    "own": ("own", lambda model, tokenizer: None),
    "trl": ("trl", lambda model, tokenizer: None),
    "trl-sampler": ("trl", ModelSampler),
    "own-vllm": ("own", lambda model, tokenizer: vllm_sampler()),
    "trl-vllm": ("trl", lambda model, tokenizer: vllm_sampler()),
}
"""Which loop trains, and who answers the prompts; ``None`` is what the loop does by itself."""


def one_run(way: str, seed: int, **changes: Any) -> dict[str, Any]:
    """One training and its score on the test split: the run's columns, v, and accuracy with its interval."""
    trainer, sampler_of = WAYS[way]
    model, tokenizer = nano.load()
    adapter = tl.attach(model, tl.TinyLoraConfig(rank=8, u=13, n_tie="all", projection=nano.basis()))
    settings = tl.GRPOSettings(**SETTINGS | {"seed": seed} | changes)
    if trainer == "own":
        train: Callable[..., tl.Run] = tl.train_grpo
    else:
        from tinylora_lite.engines.trl import train_trl as train
    run = train(model, tokenizer, adapter, nano.task(), settings, sampler=sampler_of(model, tokenizer))
    score = tl.evaluate(
        model, tokenizer, nano.task(), problems=PROBLEMS, temperature=1.0, max_new_tokens=nano.MAX_NEW_TOKENS
    )
    columns = ("reward", "length", "logprob_diff_mean", "logprob_diff_max", "gradient_norm", "norm")
    curves = {key: [round(value, 7) for value in run.curve(key)] for key in columns if key in run.steps[0]}
    numbers = [round(value, 6) for value in adapter.vectors.detach().flatten().tolist()]
    return {
        "way": way,
        "seed": seed,
        **curves,
        "v": numbers,
        **score.summary(),
        "seconds": round(run.seconds, 1),
        "environment": run.environment,
    }


def main() -> None:
    """Makes the runs asked for and puts them into the record, in place of those of the same way and seed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trl_runs", description=__doc__)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["own", "trl", "trl-sampler"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RECORD, help="the record (default: the committed one)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for seed in arguments.seeds:
        for way in arguments.ways:
            result = one_run(way, seed)
            print(f"{way}, seed {seed}: {result['accuracy']:.3f} in {result['seconds']} s", flush=True)
            record = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"runs": []}
            others = [run for run in record["runs"] if (run["way"], run["seed"]) != (way, seed)]
            runs = sorted([*others, result], key=lambda run: (list(WAYS).index(run["way"]), run["seed"]))
            content = {"settings": SETTINGS, "problems": PROBLEMS, "runs": runs}
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            temporary = arguments.out.with_name(f"{arguments.out.name}.{os.getpid()}.tmp")
            temporary.write_text(json.dumps(content, indent=1) + "\n")
            temporary.replace(arguments.out)


if __name__ == "__main__":
    main()
