"""The measurements behind the book's first chapters: ``python -m tinylora_lite.lab.study``.

A trial is one training run on a shipped base, scored on held-out problems; its record is a file. What is recorded is
not run again, so an interrupted study goes on where it stopped. Learning rates are swept and scored on the validation
split; the test split is read by the trials of the report and the curve alone, each with the best rate of its sweep.

Which trials there are and what their records say is in :mod:`tinylora_lite.lab.study_trials`, whose names are here too.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from tinylora_lite import nano
from tinylora_lite.adapter.adapter import attach
from tinylora_lite.adapter.config import TinyLoraConfig, lora_xs
from tinylora_lite.evaluation.evaluate import evaluate
from tinylora_lite.evaluation.score import Completion
from tinylora_lite.files.basis import load_basis, save_basis
from tinylora_lite.lab.study_trials import (
    ALL,
    CALIBRATED,
    CURVE,
    HEADLINES,
    KEPT,
    LORA,
    LORA_XS,
    PAPER,
    RANK_ONE,
    RESULTS,
    SAME_SHAPE,
    SEEDS,
    UNTIED,
    XS_LARGE,
    XS_ONE,
    XS_TWO,
    Record,
    Trial,
    best_rate,
    over_seeds,
    path_of,
    rates_of,
    records,
    seeds_of,
    sweep,
)
from tinylora_lite.training.calibrate import calibrate
from tinylora_lite.training.grpo import train_grpo
from tinylora_lite.training.lora_baseline import train_lora
from tinylora_lite.training.settings import GRPOSettings
from tinylora_lite.utils.record import environment

__all__ = [
    "ALL",
    "CALIBRATED",
    "CURVE",
    "HEADLINES",
    "KEPT",
    "LORA",
    "LORA_XS",
    "PAPER",
    "RANK_ONE",
    "RESULTS",
    "SAME_SHAPE",
    "SEEDS",
    "UNTIED",
    "XS_LARGE",
    "XS_ONE",
    "XS_TWO",
    "Record",
    "Trial",
    "adapter_config",
    "best_rate",
    "main",
    "nano",
    "over_seeds",
    "path_of",
    "rates_of",
    "records",
    "run_base",
    "run_trial",
    "seeds_of",
    "settings_of",
    "sweep",
    "writer_of",
]


def settings_of(trial: Trial) -> GRPOSettings:
    """32 prompts, 8 completions each, and the trial's own learning rate, steps and seed."""
    return GRPOSettings(
        steps=trial.steps,
        learning_rate=trial.learning_rate,
        schedule="linear",
        warmup=3 if trial.method == "all weights" else 0,
        max_new_tokens=nano.MAX_NEW_TOKENS,
        seed=trial.seed,
    )


def adapter_config(trial: Trial, folder: Path = RESULTS) -> TinyLoraConfig:
    """The adapter of a trial; a calibrated one makes its basis on the first call and finds it afterwards."""
    if trial.method == "LoRA-XS":
        return lora_xs(trial.rank, sigma=trial.sigma)
    options: dict[str, Any] = {"rank": trial.rank, "u": trial.u, "n_tie": trial.n_tie, "seed": trial.seed}
    options["sigma"] = trial.sigma
    if trial.method != "calibrated":
        return TinyLoraConfig(**options)
    path = folder / trial.base / "bases" / f"r{trial.rank}-looks{trial.looks}-seed{trial.seed}.safetensors"
    if not path.exists():
        model, tokenizer = nano.load(trial.base)
        basis = calibrate(
            model,
            tokenizer,
            nano.task(),
            rank=trial.rank,
            looks=trial.looks,
            seed=trial.seed,
            max_new_tokens=nano.MAX_NEW_TOKENS,
        )
        save_basis(basis, path)
    return TinyLoraConfig(**options, projection=load_basis(path))


def run_trial(trial: Trial, folder: Path = RESULTS) -> Record:
    """Runs a trial and writes its record, or reads the record where there is one."""
    path = path_of(trial, folder)
    if path.exists():
        return dict(json.loads(path.read_text(encoding="utf-8")))
    started = time.perf_counter()
    model, tokenizer = nano.load(trial.base)
    task, settings = nano.task(), settings_of(trial)
    if trial.method == "LoRA":
        adapter, run = None, train_lora(model, tokenizer, task, settings, rank=trial.rank)
    else:
        adapter = None if trial.method == "all weights" else attach(model, adapter_config(trial, folder))
        run = train_grpo(model, tokenizer, adapter, task, settings, progress=False)
    scores = {}
    for name, temperature in (("sampled", 1.0), ("greedy", 0.0)):
        score = evaluate(
            model,
            tokenizer,
            task,
            split=trial.split,
            temperature=temperature,
            max_new_tokens=nano.MAX_NEW_TOKENS,
            seed=trial.seed,
        )
        scores[name] = score.summary()
    record = {
        "trial": asdict(trial),
        **scores,
        "vectors": [] if adapter is None or adapter.num_parameters > KEPT else adapter.vectors.tolist(),
        "seconds": round(time.perf_counter() - started, 1),
        "run": _rounded(asdict(run)),
    }
    _write(path, record)
    return record


def writer_of(completion: Completion) -> str:
    """Whose style an answer is in, by the way it opens."""
    openings = {"####": "hasty", "ok,": "chatty", "start": "sloppy"}
    return next((who for opening, who in openings.items() if completion.text.startswith(opening)), "careful")


def run_base(base: str = nano.BASE, folder: Path = RESULTS) -> Record:
    """Scores an untouched base on the 1,000 test problems, 8 samples each, and says whose style the answers are in."""
    path = folder / base / "base.json"
    if path.exists():
        return dict(json.loads(path.read_text(encoding="utf-8")))
    model, tokenizer = nano.load(base)
    options: dict[str, Any] = {"max_new_tokens": nano.MAX_NEW_TOKENS}
    sampled = evaluate(model, tokenizer, nano.task(), samples=8, **options)
    greedy = evaluate(model, tokenizer, nano.task(), temperature=0, **options)
    answers: dict[str, list[float]] = {}
    for completion in sampled.completions:
        answers.setdefault(writer_of(completion), []).append(completion.reward)
    record = {
        "base": base,
        "sampled": sampled.summary(),
        "greedy": greedy.summary(),
        "pass_at": {str(k): sampled.pass_at(k) for k in (1, 2, 4, 8)},
        "writers": {
            who: {"share": len(rewards) / len(sampled.completions), "accuracy": sum(rewards) / len(rewards)}
            for who, rewards in sorted(answers.items())
        },
        "environment": environment(),
    }
    _write(path, record)
    return record


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def _write(path: Path, record: Record) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["base", "sweep", "report", "curve", "lora-xs"]
    parser.add_argument("part", choices=parts, nargs="+", help="what to run, in order")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="of the test split")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the records go (default: %(default)s)")
    arguments = parser.parse_args()
    for part in arguments.part:
        if part == "base":
            Console().print_json(data=run_base(folder=arguments.folder))
        if part in ("sweep", "lora-xs"):
            _run_all(sweep(LORA_XS if part == "lora-xs" else HEADLINES), arguments.folder)
        shapes = {"report": HEADLINES, "curve": CURVE, "lora-xs": LORA_XS}.get(part, ())
        best = [best_rate(trial, arguments.folder) for trial in shapes]
        _run_all([replace(trial, seed=seed) for seed in arguments.seeds for trial in best], arguments.folder)


def _run_all(queue: list[Trial], folder: Path) -> None:
    for number, trial in enumerate(queue, 1):
        record = run_trial(trial, folder)
        sampled, greedy = record["sampled"]["accuracy"], record["greedy"]["accuracy"]
        outcome = f"sampled {sampled:.3f}, greedy {greedy:.3f}, {record['seconds']:.0f} s"
        Console().print(f"{number}/{len(queue)} {trial.name}: {outcome}", highlight=False)


if __name__ == "__main__":
    main()
