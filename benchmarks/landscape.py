"""Computes the landscapes that :mod:`tinylora_lite.lab.landscape` draws: the reward for every value of few numbers.

A grid of v is a population: many points answer in one batch, all of them the same problems with the same random
numbers, so that neighbours differ by v alone. On the same problems the loss of worked answers is computed, which
imitation minimises, and the paths that GRPO, SFT and an evolution strategy take.

``python -m benchmarks.landscape`` computes what is missing of ``VIEWS``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from tinylora_lite import nano
from tinylora_lite.adapter.batched import Population, attach_population
from tinylora_lite.adapter.config import TinyLoraConfig
from tinylora_lite.adapter.weights import base_fingerprint
from tinylora_lite.evaluation.evaluate import evaluate_population
from tinylora_lite.lab.bases import config_of
from tinylora_lite.lab.landscape import Found, path_of
from tinylora_lite.lab.running import train
from tinylora_lite.lab.store import RESULTS, rounded
from tinylora_lite.lab.tasks import task_of
from tinylora_lite.lab.trial import Trial, settings_of
from tinylora_lite.sampling.logprobs import completion_logprobs
from tinylora_lite.tasks.task import Example, Task
from tinylora_lite.training.evolution import train_es
from tinylora_lite.training.sft import encode_solutions
from tinylora_lite.utils.distributed import hide_progress
from tinylora_lite.utils.files import atomic_write
from tinylora_lite.utils.record import Run, describe, environment

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WRITERS = {"careful": "nano", "stranger": "demonstrations: stranger"}
"""Whose worked answers the loss is taken on, and the task that has them."""
ROWS = 2688
"""Completions sampled together."""
SEEDS = 3
"""Paths of each method."""


@dataclass(frozen=True)
class View:
    """A landscape: of which numbers, how far and how finely.

    Attributes:
        name: of the file, after ``landscape-``.
        trial: the numbers, one or two of them, and P's seed.
        ranges: the least and the largest value of each number.
        points: on each axis.
        problems: of the validation split, answered and imitated at every point.
        rate: of the paths: Adam's first learning rate, and CMA-ES's first sigma.
    """

    name: str
    trial: Trial
    ranges: tuple[tuple[float, float], ...]
    points: int
    problems: int
    rate: float

    @property
    def axes(self) -> list[list[float]]:
        """The values of each number. An odd count of points puts v = 0 on the grid of a symmetric range."""
        return [torch.linspace(low, high, self.points, dtype=torch.float64).tolist() for low, high in self.ranges]


_RANDOM, _CALIBRATED = Trial(n_tie=25), Trial(numbers="calibrated", rank=8, u=2, n_tie="all")
VIEWS = (
    View("calibrated-2", _CALIBRATED, ((-2.0, 2.0), (-2.0, 2.0)), 21, 128, 0.1),
    View("random-2", _RANDOM, ((-0.5, 0.5), (-0.5, 0.5)), 21, 128, 0.03),
    View("calibrated-1", replace(_CALIBRATED, u=1), ((-2.0, 2.0),), 81, 256, 0.1),
    View("random-1", replace(_RANDOM, n_tie="all"), ((-0.5, 0.5),), 81, 256, 0.03),
)
METHODS = {
    "grpo": Trial(method="grpo"),
    "es": Trial(method="es", steps=40),
    "sft": Trial(method="sft", steps=60, trained_on=WRITERS["stranger"]),
}
"""What walks over each landscape; numbers, rate and seed are the view's."""


def surface(
    base: str, config: TinyLoraConfig, axes: Sequence[Sequence[float]], problems: int, path: Path, *, seed: int = 0
) -> Found:
    """The mean reward and the losses of imitation on a grid of v, computed as far as ``path`` does not hold them.

    Args:
        base: the name of a shipped base.
        config: an adapter with as many numbers as there are axes.
        axes: the values of each number; points are in the order of ``itertools.product``.
        problems: of the validation split.
        path: a JSON file, written anew after every batch of points; an interrupted surface goes on from there.
        seed: of the sampling; at v = 0 the reward is that of ``evaluate(..., split="validation", seed=seed)``.

    Returns:
        The landscape without paths.

    Raises:
        ValueError: the config has another count of numbers, or ``path`` holds something else.
    """
    model, tokenizer = nano.load(base)
    points = list(itertools.product(*axes))
    at_once = min(max(1, ROWS // problems), len(points))
    population = attach_population(model, [config] * at_once)
    shape = population.vectors[0].shape
    if shape.numel() != len(axes):
        raise ValueError(f"the config has {shape.numel()} numbers, and there are {len(axes)} axes; give one for each")
    words = describe(population.identity(0), shape.numel())
    settings = {
        "base": base,
        "fingerprint": base_fingerprint(model),
        "adapter": re.sub(r" \(\w+\)", "", words),  # as the stored landscapes have it
        "axes": rounded(list(map(list, axes))),
        "problems": problems,
        "seed": seed,
    }
    found = _open(path, settings)
    tasks = {writer: task_of(name, base) for writer, name in WRITERS.items()}
    options: dict[str, Any] = {
        "split": "validation",
        "problems": problems,
        "max_new_tokens": nano.MAX_NEW_TOKENS,
        "seed": seed,
    }
    starts = range(len(found["reward"]), len(points), at_once)
    for start in tqdm(starts, path.stem, disable=hide_progress()):
        started = time.perf_counter()
        chunk = points[start : start + at_once]
        with torch.no_grad():
            for v, point in zip(population.vectors, chunk, strict=False):
                v.copy_(torch.tensor(point).view(shape))
        scores = evaluate_population(model, tokenizer, tasks["careful"], population, **options)[: len(chunk)]
        for key, name in (("reward", "accuracy"), ("low", "low"), ("high", "high")):
            found[key] += [getattr(score, name) for score in scores]
        for writer, task in tasks.items():
            losses = imitation_losses(model, tokenizer, population, task, task.validation[:problems])
            found[writer] += losses[: len(chunk)].tolist()
        found["seconds"] += time.perf_counter() - started
        _write(path, found)
    return found


@torch.no_grad()
def imitation_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    population: Population,
    task: Task,
    examples: Sequence[Example],
) -> Tensor:
    """The mean of ``-log p`` over the tokens of the examples' worked answers, ``[adapters]`` float32, in nats."""
    rows, K = encode_solutions(tokenizer, task, examples), len(population)
    sums = torch.zeros(K)
    for index in torch.argsort(rows.lengths, stable=True).split(max(1, ROWS // 4 // K)):
        part = replace(rows.rows(index.repeat(K)), adapters=torch.arange(K).repeat_interleave(len(index)))
        sums -= (completion_logprobs(model, part) * part.completion_mask).view(K, -1).sum(dim=1)
    return sums / rows.lengths.sum()


def walk(view: View, found: Found, path: Path) -> Found:
    """Adds to ``found`` the paths of training that ``path`` lacks, or that it holds with other settings."""
    for method, walker in METHODS.items():
        settings = walker.settings() | {"learning_rate": view.rate, "seeds": SEEDS}
        if found["paths"].get(method, {}).get("settings") != settings:
            started = time.perf_counter()
            trials = [
                replace(walker, base=view.trial.base, learning_rate=view.rate, seed=seed) for seed in range(SEEDS)
            ]
            found["paths"][method] = {"settings": settings, "v": paths(trials, config_of(view.trial))}
            found["seconds"] += time.perf_counter() - started
            _write(path, found)
    return found


def paths(trials: Sequence[Trial], config: TinyLoraConfig) -> list[list[list[float]]]:
    """V before the first and after every step of trials that differ in their seed, on the same directions."""
    first = trials[0]
    model, tokenizer = nano.load(first.base)
    if first.method == "es":
        task = task_of(first.task, first.base)
        runs = [train_es(model, tokenizer, config, task, settings_of(trial))[0] for trial in trials]
        walked = [[[row[f"v{i}"] for i in range(run.parameters)] for row in run.steps] for run in runs]
    else:
        population = attach_population(model, [config] * len(trials))
        walked = [[] for _ in trials]

        def note(_: list[Run]) -> None:
            for own, v in zip(walked, population.vectors, strict=True):
                own.append(v.detach().flatten().tolist())

        train(trials, model, tokenizer, population, note)
    return [[[0.0] * len(own[0]), *own] for own in walked]


def compute(view: View, folder: Path = RESULTS) -> Found:
    """A landscape with its paths, from its file in ``folder``; what is missing there is computed first."""
    path = path_of(view.name, folder)
    return walk(view, surface(view.trial.base, config_of(view.trial), view.axes, view.problems, path), path)


def _open(path: Path, settings: dict[str, Any]) -> Found:
    if path.is_file():
        found: Found = json.loads(path.read_text(encoding="utf-8"))
        if found["settings"] != settings:
            raise ValueError(f"{path} holds a landscape of other settings; delete it, or give another path")
        return found
    nothing: Found = {key: [] for key in ("reward", "low", "high", *WRITERS)}
    return {"settings": settings} | nothing | {"paths": {}, "seconds": 0.0, "environment": environment()}


def _write(path: Path, found: Found) -> None:
    atomic_write(path, json.dumps(rounded(found)) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Computes what is missing of the views named, or of all."""
    views = {view.name: view for view in VIEWS}
    parser = argparse.ArgumentParser(prog="python -m benchmarks.landscape", description=main.__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(views)}; none means all")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="of the landscapes (default: the book's)")
    chosen = parser.parse_args(arguments)
    unknown = [name for name in chosen.names if name not in views]
    if unknown:
        parser.error(f"no landscape named {unknown[0]}; there are: {', '.join(views)}")
    torch.set_num_threads(1)  # models of this size are slower on more
    for name in chosen.names or views:
        found = compute(views[name], chosen.folder)
        print(f"{name}: {len(found['reward'])} points, {found['seconds']:.0f} s in all", file=sys.stderr)


if __name__ == "__main__":
    main()
