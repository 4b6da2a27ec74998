"""Run by the Python that has vLLM: writes the answers of one engine and of the model itself.

    python sample_vllm.py WAY FOLDER

WAY is ``lora``, ``merged``, or ``in place``: merged as on a GPU, one weight of a packed layer at a time, which a CPU
can too where its layers keep the order of a checkpoint. A process of its own, since vLLM binds threads to cores.
"""

import json
import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import torch

import tinylora_lite as tl
from tinylora_lite import nano
from tinylora_lite.sampling import vllm as vllm_sampler
from tinylora_lite.sampling.logprobs import completion_logprobs
from tinylora_lite.sampling.rollouts import Rollouts, encode_prompts
from tinylora_lite.sampling.sampler import ModelSampler
from tinylora_lite.sampling.vllm import VllmSampler

PROMPTS = 16
SWAPS = 30
# The sizes and seeds of v are those of test_vllm.py, which leave no greedy choice a near tie. The second adapter has
# fewer modules than the first: what the first did to the others must go.
EVERYWHERE = tl.TinyLoraConfig(rank=8, u=13, n_tie="all", projection=nano.basis()), 0.4, 4
SOMEWHERE = (
    tl.TinyLoraConfig(
        rank=2,
        u=2,
        n_tie=2,
        tying="structured",
        target_modules=["k_proj", "gate_proj", "model.layers.3.self_attn.q_proj", "model.layers.5.mlp.down_proj"],
    ),
    0.25,
    0,
)


def main(way: str, folder: Path) -> None:
    model, tokenizer = nano.load()
    # A second end token, which only generation_config.json knows: answers stop where they subtract, too.
    also_ends = tokenizer("5 - 3", add_special_tokens=False)["input_ids"][1]
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, also_ends]
    model.save_pretrained(folder / "base")
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder / "temporary")
    Path(tempfile.tempdir).mkdir()
    if way == "in place":
        import vllm._custom_ops

        vllm._custom_ops._supports_onednn = False
    state, engines = torch.get_rng_state(), os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING")
    started = time.perf_counter()
    theirs = VllmSampler(
        folder / "base",
        tokenizer,
        sync="lora" if way == "lora" else "merged",
        max_model_len=256,
        dtype="float32",
        block_size=32,
        kv_cache_memory_bytes=64 * 2**20,
    )
    result = {
        "seconds to start": time.perf_counter() - started,
        "random state kept": torch.equal(state, torch.get_rng_state()),
        "environment kept": engines == os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING"),
        "also ends": also_ends,
    }
    if way == "in place":
        vllm_sampler._on_cpu = lambda: False
    mine = ModelSampler(model, tokenizer)
    task = nano.task()
    prompts = encode_prompts(tokenizer, task, task.test[:PROMPTS])

    def both(**settings) -> dict:
        return {
            name: shown(sampler.sample(*prompts, **settings)) for name, sampler in (("ours", mine), ("vllm", theirs))
        }

    def scored(**settings) -> dict:
        """What vLLM draws, with its log-probabilities and those of the model."""
        drawn = theirs.sample(*prompts, max_new_tokens=nano.MAX_NEW_TOKENS, **settings)
        with torch.no_grad():
            odds = completion_logprobs(model, drawn, settings["temperature"]) * drawn.completion_mask
        return {"vllm": shown(drawn), "odds": odds.tolist()}

    greedy = {"max_new_tokens": nano.MAX_NEW_TOKENS, "temperature": 0.0}
    result["base, before the first sync"] = both(**greedy)
    adapter = attached(model, *EVERYWHERE)
    result["seconds of a sync"] = synced(theirs, adapter)
    result["everywhere"] = both(**greedy)
    leaves_it_out = SimpleNamespace(sync=lambda _: theirs.sync(None), sample=theirs.sample)
    result["checked"] = {
        name: asdict(tl.check_sampler(model, tokenizer, adapter, sampler, task, temperature=0.7))
        for name, sampler in (("base", leaves_it_out), ("adapter", theirs))
    }
    result["short"] = both(max_new_tokens=6, temperature=0.0)
    for name, settings in {
        "drawn": {"temperature": 0.7, "seed": 3},
        "drawn again": {"temperature": 0.7, "seed": 3},
        "drawn otherwise": {"temperature": 0.7, "seed": 4},
        "drawn at 1": {"temperature": 1.0, "seed": 3},
    }.items():
        result[name] = scored(**settings)
    halves = [
        theirs.sample(*(t[part] for t in prompts), max_new_tokens=nano.MAX_NEW_TOKENS, temperature=0.7, seed=3,
                      first_row=part.start)
        for part in (slice(0, 5), slice(5, PROMPTS))
    ]  # fmt: skip
    result["drawn in two parts"] = [row for half in halves for row in shown(half)["tokens"]]
    adapter.detach()

    adapter = attached(model, *SOMEWHERE)
    theirs.sync(adapter)
    result["somewhere"] = both(**greedy)
    theirs.sync(None)
    with adapter.disabled():
        result["base again"] = both(**greedy)

    sizes = []
    for swap in range(SWAPS):
        with torch.no_grad():
            adapter.vectors.fill_(0.01 * swap)
        theirs.sync(adapter)
        theirs.sample(*prompts, max_new_tokens=1)
        sizes.append(held(theirs))
    result["held after each swap"] = sizes
    theirs.sync(None)
    result["held by the base"] = held(theirs)
    adapter.detach()

    # Long prompts, whose keys and values vLLM keeps; then other weights.
    prompts = encode_prompts(tokenizer, task, [tl.Example(" ".join(e.prompt for e in task.test[:5]), "")])
    result["long prompt"] = int(prompts[1].sum())
    adapter = attached(model, *EVERYWHERE)
    reset = theirs.llm.reset_prefix_cache
    for name, keep in (("cache reset", False), ("cache kept", True)):
        adapter.vectors.data.neg_()
        theirs.sync(adapter)
        theirs.sample(*prompts, max_new_tokens=1)
        adapter.vectors.data.neg_()
        theirs.llm.reset_prefix_cache = (lambda: True) if keep else reset
        theirs.sync(adapter)
        result[name] = both(max_new_tokens=8, temperature=0.0)
        theirs.llm.reset_prefix_cache = reset

    with torch.no_grad():
        adapter.vectors.fill_(1e30)
    theirs.sync(adapter) if way == "lora" else None
    adapter.detach()
    adapter = attached(model, tl.TinyLoraConfig(rank=16, u=1), 1.0, 0)
    result["errors"] = {
        "not finite": said(lambda: theirs.sample(*prompts, max_new_tokens=1)) if way == "lora" else None,
        "too long": said(lambda: theirs.sample(*prompts, max_new_tokens=256)),
        "rank": said(lambda: theirs.sync(adapter)) if way == "lora" else None,
    }
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


def attached(model, config, size, seed):
    adapter = tl.attach(model, config)
    with torch.no_grad():
        noise = torch.randn(adapter.vectors.shape, generator=torch.Generator().manual_seed(seed))
        adapter.vectors.copy_(size * noise)
    return adapter


def synced(sampler, adapter) -> float:
    started = time.perf_counter()
    sampler.sync(adapter)
    return time.perf_counter() - started


def shown(rollouts: Rollouts) -> dict:
    return {
        "tokens": rollouts.completion_ids.tolist(),
        "mask": rollouts.completion_mask.tolist(),
        "logprobs": rollouts.logprobs.tolist(),
        "entropies": rollouts.entropies.tolist(),
        "truncated": rollouts.truncated.tolist(),
        "texts": rollouts.texts,
    }


def held(sampler) -> list[int]:
    """LoRAs in the engine, folders on the disk."""
    loras = sampler.llm.llm_engine.list_loras() if sampler.mode == "lora" else ()
    return [len(loras), len(list(Path(tempfile.gettempdir()).glob("tinylora-*")))]


def said(call) -> str:
    try:
        call()
    except (FloatingPointError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
