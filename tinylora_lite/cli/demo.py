"""See TinyLoRA work on this machine, in about three minutes and without a network.

Two adapters of 13 numbers are trained by GRPO on a small model that comes with the library: one with the paper's
random projections, and one whose projections were calibrated (this project's own method).
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from tinylora_lite import nano
from tinylora_lite.adapter.adapter import attach
from tinylora_lite.adapter.config import TinyLoraConfig
from tinylora_lite.adapter.projection import Basis
from tinylora_lite.cli.report import report
from tinylora_lite.evaluation.evaluate import evaluate
from tinylora_lite.evaluation.score import Completion, Score
from tinylora_lite.files.adapter_file import save
from tinylora_lite.files.basis import save_basis
from tinylora_lite.planning.counting import plan
from tinylora_lite.training.calibrate import calibrate as calibrate_basis
from tinylora_lite.training.grpo import train_grpo
from tinylora_lite.training.settings import GRPOSettings
from tinylora_lite.utils.record import Run
from tinylora_lite.view.progress import LiveProgress, Progress, progress_for, score_table

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

HELP = "train 13 numbers on a small model and see what they change"
EXAMPLE = "tinylora demo"
SEED_HELP = "of the random projections, the order of problems and the sampling"

NUMBERS = 13
STEPS = 30
PROMPTS = 32
GROUP_SIZE = 8
LEARNING_RATES = {"random": 0.1, "calibrated": 0.2}
TEST_PROBLEMS = 500
BASIS_RANK = 8
FOLDER = Path("tinylora-demo")


@dataclass(frozen=True)
class Trained:
    """One trained adapter: how it was trained, what it scores, its numbers, and its file."""

    parameters: int
    run: Run
    score: Score
    vectors: tuple[float, ...]
    file: Path

    @property
    def payload_bytes(self) -> int:
        """Of the numbers alone, as bfloat16."""
        return 2 * self.parameters

    def summary(self) -> dict[str, Any]:
        """What the command prints as JSON."""
        return {
            "parameters": self.parameters,
            "trained": self.score.summary(),
            "file": str(self.file),
            "bytes": self.file.stat().st_size,
            "payload_bytes": self.payload_bytes,
        }


@dataclass(frozen=True)
class Demo:
    """What came out: the base's score, the two adapters, and the seconds from start to end."""

    base: Score
    random: Trained
    calibrated: Trained
    seconds: float

    def summary(self) -> dict[str, Any]:
        """What the command prints as JSON: the calibrated adapter's results, the other's under ``random``."""
        return {
            **self.calibrated.summary(),
            "base": self.base.summary(),
            "seconds": round(self.seconds, 1),
            "random": self.random.summary(),
        }

    def examples(self, count: int = 3) -> list[tuple[Completion, Completion, Completion]]:
        """The first test problems, answered by the base, the random and the calibrated adapter."""
        scores = (self.base, self.random.score, self.calibrated.score)
        return list(zip(*(score.completions[:count] for score in scores), strict=True))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``tinylora demo``."""
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of training, for each adapter (default: {STEPS})")
    parser.add_argument(
        "--problems", type=int, default=TEST_PROBLEMS, help=f"of the test set (default: {TEST_PROBLEMS})"
    )
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="make the calibrated basis anew, not take the shipped one",
    )
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"where the files go (default: {FOLDER})")


def run(arguments: argparse.Namespace) -> None:
    """Shows the progress while it runs and a report at the end, or JSON."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    console = Console()
    with progress_for(console, plain=arguments.json) as progress:
        demo = run_demo(
            steps=arguments.steps,
            problems=arguments.problems,
            seed=arguments.seed,
            calibrate=arguments.calibrate,
            folder=arguments.folder,
            progress=progress,
        )
    if arguments.json:
        print(json.dumps(demo.summary()))
        return
    if isinstance(progress, LiveProgress):
        console.print(progress)
    else:
        console.print(score_table(progress.scores))
    console.print(report(demo))


def run_demo(
    *,
    steps: int = STEPS,
    problems: int = TEST_PROBLEMS,
    seed: int = 0,
    calibrate: bool = False,
    folder: str | Path = FOLDER,
    progress: Progress | None = None,
) -> Demo:
    """Trains 13 numbers with random and with calibrated projections on the nano base, and evaluates before and after.

    Args:
        steps: of GRPO for each adapter, ``PROMPTS · GROUP_SIZE`` completions each.
        problems: of the test split, one sampled completion each, the same for all three.
        seed: of the random projections, the order of problems and the sampling.
        calibrate: makes the basis anew, from training problems, instead of taking the one that is shipped.
        folder: where the adapters (``random.tinylora``, ``calibrated.tinylora``), the records of the runs and a new
            basis are written.
        progress: where to show how far it is; ``None`` shows nothing.

    Raises:
        ValueError: ``steps`` or ``problems`` is below 1.
        OSError: ``folder`` cannot be made or written, or the basis that should be shipped is missing.
    """
    if problems < 1:
        raise ValueError(f"problems must be at least 1, not {problems}")
    settings = {
        name: GRPOSettings(
            steps=steps,
            prompts_per_step=PROMPTS,
            group_size=GROUP_SIZE,
            max_new_tokens=nano.MAX_NEW_TOKENS,
            learning_rate=rate,
            schedule="linear",
            seed=seed,
        )
        for name, rate in LEARNING_RATES.items()
    }
    folder, progress = Path(folder), progress or Progress()
    folder.mkdir(parents=True, exist_ok=True)  # fails now rather than after a minute of training
    progress.steps = steps
    started = time.perf_counter()
    progress.begin("loading the model")
    model, tokenizer = nano.load()
    world = _World(model, tokenizer, folder, problems, seed, progress)
    basis = world.calibrate() if calibrate else nano.basis()
    base = world.evaluate("base")
    configs = {
        "random": plan(model, NUMBERS, seed=seed),
        "calibrated": TinyLoraConfig(rank=basis.rank, u=NUMBERS, n_tie="all", seed=seed, projection=basis),
    }
    trained = {name: world.train(name, configs[name], settings[name]) for name in configs}
    return Demo(base, trained["random"], trained["calibrated"], time.perf_counter() - started)


@dataclass(frozen=True)
class _World:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    folder: Path
    problems: int
    seed: int
    progress: Progress

    def calibrate(self) -> Basis:
        self.progress.begin("calibrating a basis")
        basis = calibrate_basis(
            self.model,
            self.tokenizer,
            nano.task(),
            rank=BASIS_RANK,
            directions=NUMBERS,
            seed=self.seed,
            max_new_tokens=nano.MAX_NEW_TOKENS,
            progress=self.progress.advance,
        )
        # Beside the adapter, where tl.load looks for it.
        save_basis(basis, self.folder / "basis.safetensors")
        return basis

    def evaluate(self, name: str) -> Score:
        self.progress.begin(f"testing: {name}", self.problems)
        score = evaluate(
            self.model,
            self.tokenizer,
            nano.task(),
            problems=self.problems,
            max_new_tokens=nano.MAX_NEW_TOKENS,
            seed=self.seed,
            progress=self.progress.advance,
        )
        self.progress.scored(name, score)
        return score

    def train(self, name: str, config: TinyLoraConfig, settings: GRPOSettings) -> Trained:
        adapter = attach(self.model, config)
        try:
            self.progress.begin(f"training: {name} P", settings.steps)

            def on_step(run: Run) -> None:
                self.progress.step(name, run.curve(), adapter.vectors.flatten().tolist())

            record = train_grpo(
                self.model, self.tokenizer, adapter, nano.task(), settings, on_step=on_step, progress=False
            )
            record.save(self.folder / f"{name}.run.json")
            score = self.evaluate(name)
            file = save(adapter, self.folder / f"{name}.tinylora").resolve()
            vectors = tuple(adapter.vectors.flatten().tolist())
            return Trained(adapter.num_parameters, record, score, vectors, file)
        finally:
            adapter.detach()
