"""The records behind the chapter *Ship it*: an adapter of 13 numbers, and vLLM's answers with it.

    python benchmarks/serving.py train      # one to two minutes: thirteen.tinylora and thirteen.json
    VLLM_PYTHON=.venv-vllm/bin/python python benchmarks/serving.py serve      # one minute: serving.json

vLLM needs an environment of its own, which ``make test-vllm`` sets up. Everything is compared in float32: in bfloat16
two engines differ by their roundings, and the comparison would measure those.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import tinylora_lite as tl
from tinylora_lite import nano
from tinylora_lite.lab.claims import chapters
from tinylora_lite.lab.trial import settings_of
from tinylora_lite.sampling.logprobs import completion_logprobs
from tinylora_lite.sampling.rollouts import encode_prompts
from tinylora_lite.sampling.sampler import sample
from tinylora_lite.utils.record import environment

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "book" / "results"
SERVER = ROOT / "tests" / "serving" / "serve_vllm.py"
ADAPTER = "thirteen.tinylora"
PROBLEMS = 200

Answers = list[dict[str, list[Any]]]
"""For every problem a greedy answer, then for every problem a sampled one: ``tokens`` and their ``logprobs``."""


def train(folder: Path) -> None:
    """Trains the calibrated adapter of the first chapters on the shipped basis, and scores what its file holds."""
    model, tokenizer = nano.load()
    trial = chapters.CALIBRATED.trial
    config = tl.TinyLoraConfig(rank=trial.rank, u=trial.u, n_tie="all", projection=nano.basis())
    adapter = tl.attach(model, config)
    run = tl.train_grpo(model, tokenizer, adapter, nano.task(), settings_of(trial))
    path = tl.save(adapter, folder / ADAPTER)
    trained = adapter.vectors.detach().clone()
    adapter.detach()
    adapter = tl.load(model, path)
    scores = {
        name: tl.evaluate(
            model, tokenizer, nano.task(), temperature=temperature, max_new_tokens=nano.MAX_NEW_TOKENS
        ).summary()
        for name, temperature in (("sampled", 1.0), ("greedy", 0.0))
    }
    _write(
        folder / "thirteen.json",
        {
            "command": "python benchmarks/serving.py train",
            "file": ADAPTER,
            "bytes": path.stat().st_size,
            "trained": trained[0].tolist(),
            "stored": adapter.vectors[0].tolist(),
            **scores,
            "seconds": round(run.seconds, 1),
            "rewards": [round(reward, 4) for reward in run.curve("reward")],
            "settings": asdict(settings_of(trial)),
            "environment": run.environment,
        },
    )


def serve(folder: Path) -> None:
    """Has vLLM answer held-out problems with the base, with the adapter as a LoRA, and merged; compares with ours."""
    model, tokenizer = nano.load()
    problems = nano.task().test[:PROBLEMS]
    ids, mask = encode_prompts(tokenizer, nano.task(), problems)
    prompts = [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)]
    ours = {"base": _answers(model, tokenizer, ids, mask)}
    with tempfile.TemporaryDirectory() as made:
        base, merged = nano.CHECKPOINTS / nano.BASE, Path(made) / "merged"
        adapter = tl.load(model, folder / ADAPTER)
        ours["adapter"] = _answers(model, tokenizer, ids, mask)
        loras = {f"LoRA, {dtype}": tl.export_lora(adapter, Path(made) / dtype, dtype) for dtype in ("fp32", "bf16")}
        model.save_pretrained(merged, state_dict=model.state_dict() | dict(tl.merged_weights(adapter)))
        adapter.detach()
        asked = {"base": ("base", None), **{name: ("adapter", name) for name in loras}}
        started, theirs = _vllm(base, loras, prompts, ours, asked, tokenizer.eos_token_id)
        restarted, whole = _vllm(merged, {}, prompts, ours, {"merged": ("adapter", None)}, tokenizer.eos_token_id)
        files = {
            name: sum(file.stat().st_size for file in made_folder.glob("*.safetensors"))
            for name, made_folder in {**loras, "merged": merged}.items()
        }
    rows = {}
    for name, answers in (theirs | whole).items():
        wanted = ours["base" if name == "base" else "adapter"]
        texts = [str(tokenizer.decode(a["tokens"], skip_special_tokens=True)) for a in answers[:PROBLEMS]]
        rewards = [nano.task().reward(text, problem.gold) for text, problem in zip(texts, problems, strict=True)]
        rows[name] = {
            "same_greedy_answers": sum(
                a["tokens"] == b["tokens"] for a, b in zip(wanted[:PROBLEMS], answers[:PROBLEMS], strict=True)
            ),
            "right": sum(reward == 1 for reward in rewards),
            "tokens": sum(len(a["tokens"]) for a in wanted[PROBLEMS:]),
            "largest_log_probability_difference": max(
                abs(mine - other)
                for a, b in zip(wanted[PROBLEMS:], answers[PROBLEMS:], strict=True)
                for mine, other in zip(a["logprobs"], b["logprobs"], strict=True)
            ),
        }
    _write(
        folder / "serving.json",
        {
            "command": "python benchmarks/serving.py serve",
            "adapter": ADAPTER,
            "problems": PROBLEMS,
            "served": rows,
            "seconds_to_start": {"with LoRAs": round(started, 1), "merged": round(restarted, 1)},
            "bytes": files,
            "environment": environment() | {"vllm": _vllm_version()},
        },
    )


def _answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, ids: torch.Tensor, mask: torch.Tensor
) -> Answers:
    found: Answers = []
    for temperature in (0.0, 1.0):
        drawn = sample(model, tokenizer, ids, mask, max_new_tokens=nano.MAX_NEW_TOKENS, temperature=temperature)
        with torch.no_grad():
            scored = completion_logprobs(model, drawn)
        for tokens, logprobs, kept in zip(drawn.completion_ids, scored, drawn.completion_mask.bool(), strict=True):
            found.append({"tokens": tokens[kept].tolist(), "logprobs": logprobs[kept].tolist()})
    return found


def _vllm(
    model: Path,
    loras: dict[str, Path],
    prompts: list[list[int]],
    ours: dict[str, Answers],
    asked: dict[str, tuple[str, str | None]],
    end: int,
) -> tuple[float, dict[str, Answers]]:
    """The seconds until vLLM was ready, and for each row that is asked for its answers.

    Greedy ones are its own; of the sampled ones it scores the tokens that were drawn here.
    """
    requests: list[tuple[str | None, list[int], list[int]]] = []
    for whose, lora in asked.values():
        drawn = [answer["tokens"] for answer in ours[whose][PROBLEMS:]]
        requests += [(lora, prompt, []) for prompt in prompts]
        requests += [(lora, prompt, tokens) for prompt, tokens in zip(prompts, drawn, strict=True)]
    job = {
        "model": str(model),
        "loras": {name: str(path) for name, path in loras.items()},
        "max_model_len": 256,
        "max_tokens": nano.MAX_NEW_TOKENS,
        "ends": [end],
        "requests": requests,
        "started": time.time(),
    }
    settings = {
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_WAIT_POLICY": "passive",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    with tempfile.TemporaryDirectory() as folder:
        job_path, answers_path = Path(folder) / "job.json", Path(folder) / "answers.json"
        job_path.write_text(json.dumps(job), encoding="utf-8")
        subprocess.run([_vllm_python(), str(SERVER), job_path, answers_path], env=os.environ | settings, check=True)
        result = json.loads(answers_path.read_text(encoding="utf-8"))
    each = 2 * PROBLEMS
    parts = [result["answers"][start : start + each] for start in range(0, len(requests), each)]
    return result["seconds"], dict(zip(asked, parts, strict=True))


def _vllm_python() -> str:
    if "VLLM_PYTHON" not in os.environ:
        raise SystemExit("set VLLM_PYTHON to a Python that has vLLM; `make test-vllm` sets one up in .venv-vllm")
    return os.environ["VLLM_PYTHON"]


def _vllm_version() -> str:
    code = (
        "from importlib.metadata import packages_distributions, version;"
        "name = packages_distributions()['vllm'][0]; print(name, version(name))"
    )
    return subprocess.run([_vllm_python(), "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def _write(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["train", "serve"], nargs="+", help="what to make, in order")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the records go (default: %(default)s)")
    arguments = parser.parse_args()
    for part in arguments.part:
        {"train": train, "serve": serve}[part](arguments.folder)


if __name__ == "__main__":
    main()
