"""Run by ``accelerate launch``: trains 13 numbers for a few steps with samples from a vLLM server, and writes them.

train_with_server.py URL FOLDER
"""

import json
import sys
from pathlib import Path

import accelerate
import torch

import tinylora_lite as tl
from tinylora_lite import nano
from tinylora_lite.sampling.vllm_server import VllmServerSampler
from tinylora_lite.utils import distributed


def main(url: str, folder: Path) -> None:
    state = accelerate.PartialState(cpu=True)
    assert (state.num_processes, state.process_index) == (distributed.world_size(), distributed.rank())
    torch.set_num_threads(1)
    model, tokenizer = nano.load()
    adapter = tl.attach(model, tl.TinyLoraConfig(rank=8, u=13, n_tie="all", projection=nano.basis()))
    settings = tl.GRPOSettings(
        steps=4, prompts_per_step=8, group_size=4, max_new_tokens=nano.MAX_NEW_TOKENS, learning_rate=0.05
    )
    sampler = VllmServerSampler(url, tokenizer, folder=folder / "lora")
    rows: list[int] = []
    run = tl.train_grpo(
        model,
        tokenizer,
        adapter,
        nano.task(),
        settings,
        sampler=sampler,
        on_rollouts=lambda rollouts, _: rows.append(len(rollouts)),
        progress=False,
    )
    sampler.sync(None)
    result = {"numbers": adapter.vectors.flatten().tolist(), "steps": run.steps, "rows": rows}
    (folder / f"rank{distributed.rank()}.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
