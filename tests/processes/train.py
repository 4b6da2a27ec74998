"""Run by ``accelerate launch``: trains 13 numbers on the nano base for a few steps and writes what came out.

train.py FOLDER OPTIONS.json
"""

import json
import sys
from pathlib import Path

import accelerate
import torch

import tinylora_lite as tl
from tinylora_lite import nano
from tinylora_lite.utils import distributed
from tinylora_lite.utils.distributed import shard_model


def main(folder: Path, options: dict) -> None:
    state = accelerate.PartialState(cpu=True)
    assert (state.num_processes, state.process_index) == (distributed.world_size(), distributed.rank())
    torch.set_num_threads(1)
    model, tokenizer = nano.load()
    adapter = None
    if options.pop("adapter"):
        config = tl.TinyLoraConfig(rank=8, u=13, n_tie="all", projection=nano.basis())
        adapter = tl.attach(model, config)
    if options.pop("shard", False) and distributed.world_size() > 1:
        shard_model(model)
    settings = tl.GRPOSettings(
        prompts_per_step=8, group_size=4, max_new_tokens=nano.MAX_NEW_TOKENS, learning_rate=0.05, **options
    )
    rows = []
    run = tl.train_grpo(
        model,
        tokenizer,
        adapter,
        nano.task(),
        settings,
        folder=folder,
        on_rollouts=lambda rollouts, _: rows.append(len(rollouts)),
    )
    numbers = adapter.vectors if adapter is not None else model.model.norm.weight
    result = {"numbers": numbers.flatten().tolist(), "steps": run.steps, "evaluations": run.evaluations, "rows": rows}
    (folder / f"rank{distributed.rank()}.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
