"""vLLM serves what was trained: the same greedy tokens, and log-probabilities within 1e-3 of this library's.

`make test-vllm` sets up a Python that has vLLM and runs these tests with it in ``VLLM_PYTHON``.
"""

import json
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tinylora_lite import TinyLoraConfig, attach, export_lora, merged_weights, nano
from tinylora_lite.sampling.logprobs import completion_logprobs
from tinylora_lite.sampling.rollouts import encode_prompts
from tinylora_lite.sampling.sampler import sample

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif("VLLM_PYTHON" not in os.environ, reason="needs vLLM: run `make test-vllm`"),
]

PROMPTS = 16
TOLERANCE = 1e-3
SOME_MODULES = ["k_proj", "gate_proj", "model.layers.3.self_attn.q_proj", "model.layers.5.mlp.down_proj"]
# Settings, size of v, seed of v. The seeds are such that no greedy choice is a near tie: the two likeliest tokens are
# more than 0.005 apart, hundreds of times what float32 differs by.
ADAPTERS = {
    "rank 2, random": (TinyLoraConfig(rank=2, u=1, n_tie=16), 0.25, 5),
    "13 numbers, calibrated": (TinyLoraConfig(rank=8, u=13, n_tie="all", projection=nano.basis()), 0.4, 4),
    "some modules, structured": (
        TinyLoraConfig(rank=2, u=2, n_tie=2, tying="structured", target_modules=SOME_MODULES),
        0.25,
        0,
    ),
}
MERGED = ["rank 2, random", "13 numbers, calibrated"]
BASE = "base"


@dataclass(frozen=True)
class Answers:
    """For every prompt the greedy completion, then for every prompt one that was drawn: tokens, log-probabilities."""

    tokens: list[list[int]]
    logprobs: list[list[float]]


@dataclass(frozen=True)
class Ours:
    """What this library computes, and where the model is to be had in other forms."""

    prompts: list[list[int]]
    end: int
    answers: dict[str, Answers]
    folder: Path
    loras: dict[str, Path]
    merged: dict[str, Path]


def answers_of(model, tokenizer, prompt_ids, prompt_mask) -> Answers:
    tokens, logprobs = [], []
    for temperature in (0.0, 1.0):
        drawn = sample(
            model, tokenizer, prompt_ids, prompt_mask, max_new_tokens=nano.MAX_NEW_TOKENS, temperature=temperature
        )
        with torch.no_grad():
            scored = completion_logprobs(model, drawn)
        for row, values, mask in zip(drawn.completion_ids, scored, drawn.completion_mask.bool(), strict=True):
            tokens.append(row[mask].tolist())
            logprobs.append(values[mask].tolist())
    return Answers(tokens, logprobs)


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> Ours:
    folder = tmp_path_factory.mktemp("models")
    model, tokenizer = nano.load()
    prompt_ids, prompt_mask = encode_prompts(tokenizer, nano.task(), nano.task().test[:PROMPTS])
    answers = {BASE: answers_of(model, tokenizer, prompt_ids, prompt_mask)}
    loras, merged = {}, {}
    for number, (name, (config, size, seed)) in enumerate(ADAPTERS.items()):
        adapter = attach(model, config)
        with torch.no_grad():
            noise = torch.randn(adapter.vectors.shape, generator=torch.Generator().manual_seed(seed))
            adapter.vectors.copy_(size * noise)
        answers[name] = answers_of(model, tokenizer, prompt_ids, prompt_mask)
        loras[name] = export_lora(adapter, folder / f"lora{number}")
        if name in MERGED:
            merged[name] = folder / f"merged{number}"
            model.save_pretrained(merged[name], state_dict=model.state_dict() | dict(merged_weights(adapter)))
        adapter.detach()
    prompts = [row[mask.bool()].tolist() for row, mask in zip(prompt_ids, prompt_mask, strict=True)]
    return Ours(prompts, tokenizer.eos_token_id, answers, folder, loras, merged)


def serve(ours: Ours, model: Path, pairs: list[tuple[str, str | None]]) -> dict[tuple[str, str | None], Answers]:
    """vLLM's greedy answers to the prompts, and its log-probabilities of the completions that this library drew.

    Args:
        ours: the prompts and completions.
        model: the checkpoint.
        pairs: whose completions are scored, and the LoRA that answers and scores, or None.
    """
    requests = []
    for whose, lora in pairs:
        drawn = ours.answers[whose].tokens[PROMPTS:]
        requests += [(lora, prompt, []) for prompt in ours.prompts]
        requests += [(lora, prompt, tokens) for prompt, tokens in zip(ours.prompts, drawn, strict=True)]
    job = {
        "model": str(model),
        "loras": {lora: str(ours.loras[lora]) for _, lora in pairs if lora},
        "max_model_len": 256,
        "max_tokens": nano.MAX_NEW_TOKENS,
        "ends": [ours.end],
        "requests": requests,
        "started": time.time(),
    }
    job_path, answers_path = ours.folder / "job.json", ours.folder / "answers.json"
    job_path.write_text(json.dumps(job), encoding="utf-8")
    settings = {
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_WAIT_POLICY": "passive",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    command = [os.environ["VLLM_PYTHON"], str(Path(__file__).with_name("serve_vllm.py")), job_path, answers_path]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    result = json.loads(answers_path.read_text(encoding="utf-8"))
    print(
        f"{model.name} with {len(job['loras'])} LoRAs: vLLM ready {result['seconds']:.1f} s after its process started"
    )
    each = 2 * PROMPTS
    parts = [result["answers"][start : start + each] for start in range(0, len(requests), each)]
    return {
        pair: Answers([answer["tokens"] for answer in part], [answer["logprobs"] for answer in part])
        for pair, part in zip(pairs, parts, strict=True)
    }


def check(ours: Answers, theirs: Answers) -> None:
    assert theirs.tokens == ours.tokens
    worst = max(gap(*pair) for pair in zip(ours.logprobs, theirs.logprobs, strict=True))
    print(f"log-probabilities of {sum(map(len, ours.tokens))} tokens agree within {worst:.1e}")
    assert worst < TOLERANCE


def gap(ours: list[float], theirs: list[float]) -> float:
    """The largest difference between the log-probabilities of one completion's tokens."""
    return (torch.tensor(ours) - torch.tensor(theirs)).abs().max().item()


@pytest.fixture(scope="module")
def served(ours):
    pairs = [(BASE, None), *((name, name) for name in ADAPTERS), *((name, None) for name in ADAPTERS)]
    return serve(ours, nano.CHECKPOINTS / nano.BASE, pairs)


def test_the_base_is_served_as_it_computes_here(ours, served):
    check(ours.answers[BASE], served[BASE, None])


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_exported_lora_is_served_as_the_adapter_computes(ours, served, name):
    check(ours.answers[name], served[name, name])


@pytest.mark.parametrize("name", ADAPTERS)
def test_without_the_lora_neither_tokens_nor_probabilities_agree(ours, served, name):
    mine, theirs = ours.answers[name], served[name, None]
    same = sum(a == b for a, b in zip(mine.tokens[:PROMPTS], theirs.tokens[:PROMPTS], strict=True))
    assert same <= PROMPTS / 2
    gaps = [gap(*pair) for pair in zip(mine.logprobs[PROMPTS:], theirs.logprobs[PROMPTS:], strict=True)]
    assert min(gaps) > TOLERANCE  # so that the check above would fail on every single completion
    assert sum(gaps) / len(gaps) > 100 * TOLERANCE


@pytest.mark.parametrize("name", MERGED)
def test_merged_weights_are_served_as_the_adapter_computes(ours, name):
    check(ours.answers[name], serve(ours, ours.merged[name], [(name, None)])[name, None])
