"""The measurements behind the book's first chapters: ``python -m tinylora_lite.nano.study``.

A trial is one training run on a shipped base, scored on held-out problems; its record is a file. What is recorded is
not run again, so an interrupted study goes on where it stopped. Learning rates are swept and scored on the validation
split; the test split is read by the trials of the report and the curve alone, each with the best rate of its sweep.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from scipy import stats

from tinylora_lite import nano
from tinylora_lite.adapter import attach
from tinylora_lite.basis import load_basis, save_basis
from tinylora_lite.calibrate import calibrate
from tinylora_lite.config import Sigma, TinyLoraConfig, lora_xs
from tinylora_lite.evaluate import Completion, evaluate
from tinylora_lite.grpo import train_grpo
from tinylora_lite.grpo_settings import GRPOSettings
from tinylora_lite.nano.lora import train_lora
from tinylora_lite.runs import environment

Record = dict[str, Any]

_PACKAGED = Path(__file__).parents[1] / "results"
RESULTS = (_PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[2] / "book" / "results") / "nano"
"""Where the records lie: beside the book in a checkout, inside the package where it was installed from a wheel."""


@dataclass(frozen=True)
class Trial:
    """One training run: which numbers train, how fast, from which seed.

    Attributes:
        method: where the numbers point: ``"random"``, ``"calibrated"``, ``"LoRA-XS"`` (all entries of R),
            ``"LoRA"`` (PEFT's), or ``"all weights"``.
        learning_rate: of Adam at the first step; it falls linearly to zero.
        seed: moves the data order, the sampling, and P or the calibration.
        rank, u, n_tie: of the adapter; 0 where the method leaves no choice.
        looks: of the calibration.
        steps: of GRPO.
        split: what the trained model is scored on: ``"validation"`` in a sweep, ``"test"`` in the report.
        base: the name of a shipped base.
        sigma: where Σ stands.
    """

    method: str
    learning_rate: float
    seed: int = 0
    rank: int = 0
    u: int = 0
    n_tie: int | str = 0
    looks: int = 2
    steps: int = 30
    split: str = "test"
    base: str = nano.BASE
    sigma: Sigma = "left"

    @property
    def name(self) -> str:
        method = self.method.replace(" ", "-")
        if self.rank:
            method += f"-r{self.rank}"
        if self.u:
            method += f"-u{self.u}-tie{self.n_tie}"
        if self.method == "LoRA-XS" or self.sigma != "left":
            method += f"-{self.sigma}"
        if self.method == "calibrated" and self.looks != 2:
            method += f"-looks{self.looks}"
        return f"{self.base}/{self.split}/{method}-lr{self.learning_rate:g}-seed{self.seed}"


ALL = Trial("all weights", 3e-4)
PAPER = Trial("random", 0.1, rank=2, u=1, n_tie=4)
RANK_ONE = replace(PAPER, rank=1)
UNTIED = Trial("random", 0.1, rank=2, u=2, n_tie=1)
CALIBRATED = Trial("calibrated", 0.2, rank=8, u=13, n_tie="all")
SAME_SHAPE = replace(CALIBRATED, method="random", learning_rate=0.01)
"""The control of the calibrated trial: all its settings, and random directions."""
HEADLINES = (CALIBRATED, SAME_SHAPE, PAPER, UNTIED, ALL, RANK_ONE)
CURVE = (
    replace(CALIBRATED, looks=1),
    *(replace(PAPER, n_tie=n_tie) for n_tie in ("all", 12, 1)),
    *(replace(CALIBRATED, u=u) for u in (1, 4)),
    *(replace(CALIBRATED, rank=rank) for rank in (1, 2)),
)
XS_ONE = Trial("LoRA-XS", 0.2, rank=1, sigma="right")
"""One number for each module, for which it does not matter where Σ stands."""
XS_TWO = replace(XS_ONE, learning_rate=0.1, rank=2)
XS_LARGE = replace(XS_ONE, learning_rate=0.0025, rank=32)
LORA = Trial("LoRA", 1e-3, rank=1)
LORA_XS = (
    *(replace(XS_TWO, sigma=sigma) for sigma in ("left", "split", "right")),
    *(replace(XS_LARGE, sigma=sigma) for sigma in ("left", "right")),
    XS_ONE,
    LORA,
)
SEEDS = range(5)
KEPT = 1000
"""The most trained numbers that a record holds; more would make it a file of megabytes."""


def rates_of(trial: Trial) -> tuple[float, ...]:
    """The learning rates that are swept.

    One random number of the control drives 49 modules with 64 entries each: its P is about twenty times as long as a
    calibrated direction, and its rates are smaller by that much.
    """
    if trial.method in ("all weights", "LoRA"):
        return (3e-4, 1e-3, 3e-3)
    if trial.method == "LoRA-XS" and trial.rank > 1:
        return (0.05, 0.1, 0.2) if trial.rank == 2 else (0.000625, 0.00125, 0.0025, 0.005)
    return (0.005, 0.01, 0.02) if trial.method == "random" and trial.u == 13 else (0.1, 0.2, 0.4)


def sweep(shapes: Sequence[Trial] = HEADLINES) -> list[Trial]:
    """The learning rates of every shape, scored on the validation split: seed 0, and for ``RANK_ONE`` two more.

    Of that the first report had taken the rate that was best for seed 0, and it destroyed the model on other seeds.
    """
    return [
        replace(trial, learning_rate=rate, seed=seed, split="validation")
        for trial in shapes
        for seed in (range(3) if trial == RANK_ONE else range(1))
        for rate in rates_of(trial)
    ]


def best_rate(trial: Trial, folder: Path = RESULTS) -> Trial:
    """The trial with the rate whose mean accuracy on the validation split was best, if its shape was swept."""
    swept: dict[float, list[float]] = {}
    for rate in rates_of(trial):
        for seed in SEEDS:
            path = path_of(replace(trial, learning_rate=rate, split="validation", seed=seed), folder)
            if path.exists():
                swept.setdefault(rate, []).append(json.loads(path.read_text(encoding="utf-8"))["sampled"]["accuracy"])
    return replace(trial, learning_rate=max(swept, key=lambda rate: np.mean(swept[rate]))) if swept else trial


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


def path_of(trial: Trial, folder: Path = RESULTS) -> Path:
    """Where the record of a trial lies."""
    return folder / f"{trial.name}.json"


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


def records(folder: Path = RESULTS, base: str = nano.BASE, split: str = "test") -> list[Record]:
    """Every record of a split."""
    paths = sorted((folder / base / split).glob("*.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def seeds_of(trial: Trial, folder: Path = RESULTS) -> list[Record]:
    """The test records of a trial with the learning rate of its sweep, one for each seed that was run."""
    trial = best_rate(trial, folder)
    paths = (path_of(replace(trial, seed=seed), folder) for seed in SEEDS)
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]


def over_seeds(found: list[Record], kind: str = "sampled") -> dict[str, float]:
    """The mean accuracy over seeds and its 95 % interval (Student's): ``accuracy``, ``low``, ``high``, ``seeds``.

    Args:
        found: records that differ in their seed only, at least two.
        kind: ``"sampled"`` or ``"greedy"``.

    Raises:
        ValueError: fewer than two records.
    """
    if len(found) < 2:
        raise ValueError(f"an interval over seeds needs at least two records, not {len(found)}")
    accuracies = [record[kind]["accuracy"] for record in found]
    mean, error = float(np.mean(accuracies)), float(stats.sem(accuracies))
    low, high = stats.t.interval(0.95, len(found) - 1, loc=mean, scale=max(error, 1e-9))
    return {"accuracy": mean, "low": max(float(low), 0.0), "high": min(float(high), 1.0), "seeds": len(found)}


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
