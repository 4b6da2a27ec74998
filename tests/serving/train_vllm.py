"""Run by the Python that has vLLM: trains 13 numbers on the nano base and writes the steps.

    python train_vllm.py SAMPLER SEED FILE

SAMPLER is ``transformers``, ``lora`` or ``merged``.
"""

import json
import sys
from pathlib import Path

import torch

import tinylora_lite as tl
from tinylora_lite import nano
from tinylora_lite.sampling.vllm import VllmSampler


def main(engine: str, seed: int, file: Path) -> None:
    torch.set_num_threads(1)
    model, tokenizer = nano.load()
    sampler = None
    if engine != "transformers":
        sampler = VllmSampler(
            nano.CHECKPOINTS / nano.BASE,
            tokenizer,
            sync=engine,
            max_model_len=256,
            dtype="float32",
            kv_cache_memory_bytes=128 * 2**20,
        )
    adapter = tl.attach(model, tl.TinyLoraConfig(rank=8, u=13, n_tie="all", projection=nano.basis()))
    settings = tl.GRPOSettings(
        steps=24,
        prompts_per_step=8,
        learning_rate=0.2,
        schedule="linear",
        max_new_tokens=nano.MAX_NEW_TOKENS,
        seed=seed,
    )
    run = tl.train_grpo(model, tokenizer, adapter, nano.task(), settings, sampler=sampler, progress=False)
    file.write_text(json.dumps(run.steps), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
