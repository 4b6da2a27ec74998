"""Short runs of every kind of training; ``loop_cases.json`` holds what they gave before there was one loop.

``python tests/training/loop_cases.py FILE`` writes the file anew.
"""

import json
import sys
from dataclasses import replace

import torch

import tinylora_lite as tl
from tinylora_lite import nano
from tinylora_lite.training.grpo import GRPO
from tinylora_lite.training.loop import fit
from tinylora_lite.training.lora_baseline import train_lora
from tinylora_lite.training.sft import SFT

BASE = "qwen2-0.4m"
TASK = nano.task(train=64, validation=16, test=16)
QUICK = tl.GRPOSettings(
    steps=3, prompts_per_step=4, group_size=4, max_new_tokens=nano.MAX_NEW_TOKENS, learning_rate=0.05, micro_batch=6
)
WORKED = tl.SFTSettings(
    steps=3, prompts_per_step=8, max_new_tokens=nano.MAX_NEW_TOKENS, learning_rate=0.03, micro_batch=6, warmup=1
)
CONFIG = tl.TinyLoraConfig(rank=2, u=1, n_tie=4)
CONFIGS = [CONFIG, tl.TinyLoraConfig(rank=2, u=1, n_tie="all", seed=1), tl.TinyLoraConfig(rank=2, u=1, seed=2)]


def one(train, settings, config=CONFIG, **options):
    model, tokenizer = nano.load(BASE)
    if config is None:
        run = train(model, tokenizer, None, TASK, settings, progress=False)
        weights = model.get_parameter("model.layers.3.mlp.up_proj.weight")
        return summary(run, weights.detach()[:3, :3])
    adapter = tl.attach(model, config)
    run = train(model, tokenizer, adapter, TASK, settings, progress=False, **options)
    return summary(run, adapter.vectors.detach())


def several(train, settings):
    model, tokenizer = nano.load(BASE)
    population = tl.attach_population(model, CONFIGS)
    own = [replace(settings, seed=seed, learning_rate=rate) for seed, rate in enumerate((0.05, 0.02, 0.01))]
    objective = {tl.train_grpo: GRPO, tl.train_sft: SFT}[train](model, tokenizer, population, TASK, own)
    runs = fit(objective, progress=False)
    return [summary(run, v.detach()) for run, v in zip(runs, population.vectors, strict=True)]


def lora(settings):
    model, tokenizer = nano.load(BASE)
    run = train_lora(model, tokenizer, TASK, settings, rank=1)
    weight = next(p for name, p in model.named_parameters() if "lora_B" in name)
    return summary(run, weight.detach()[:4])


def summary(run, values):
    names = ("reward", "loss", "length", "entropy", "truncated", "gradient_norm", "norm", "clipped", "learning_rate")
    names += ("logprob_diff_mean", "logprob_diff_max", "tis_clip_frac", "frac_reward_zero_std")
    kept = {name: run.curve(name) for name in names if name in run.steps[0]}
    return {
        "parameters": run.parameters,
        **kept,
        "evaluations": run.evaluations,
        "values": torch.as_tensor(values).flatten().tolist(),
    }


def cases():
    grpo, sft = tl.train_grpo, tl.train_sft
    everything = replace(QUICK, kl=0.05, epochs_per_step=2, scale="batch", normalise="constant", truncated="mask")
    small = replace(QUICK, learning_rate=1e-3)
    return {
        "grpo": lambda: one(grpo, replace(QUICK, evaluate_every=2, evaluate_problems=16)),
        "grpo, sequence": lambda: one(grpo, replace(QUICK, normalise="sequence", scale="none", tis_cap=None)),
        "grpo, two epochs, kl, mask": lambda: one(grpo, replace(everything, max_new_tokens=24)),
        "grpo, all weights": lambda: one(grpo, small, None),
        "grpo, all weights, kl": lambda: one(grpo, replace(small, kl=0.1), None),
        "grpo, population": lambda: several(grpo, QUICK),
        "grpo, lora": lambda: lora(small),
        "sft": lambda: one(sft, replace(WORKED, evaluate_every=2, evaluate_problems=16)),
        "sft, all weights": lambda: one(sft, replace(WORKED, learning_rate=1e-3), None),
        "sft, population": lambda: several(sft, WORKED),
        "sft, lora": lambda: lora(replace(WORKED, learning_rate=1e-3)),
    }


if __name__ == "__main__":
    from pathlib import Path

    torch.set_num_threads(1)
    found = {name: run() for name, run in cases().items()}
    Path(sys.argv[1]).write_text(json.dumps(found, indent=1) + "\n")
