"""A settings file from beginning to end: score the base, train, score again, compare, and keep everything.

What the folder holds already is not done again, so the same call continues an interrupted run.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tinylora_lite.adapter.adapter import TinyLoraAdapter, attach
from tinylora_lite.adapter.basis import Basis
from tinylora_lite.evaluation.compare import Comparison, compare
from tinylora_lite.evaluation.score import Score
from tinylora_lite.experiment.models import load_tokenizer, nano_package
from tinylora_lite.experiment.runner import OnRollouts, Runner
from tinylora_lite.experiment.settings import RunSettings
from tinylora_lite.files.adapter_file import save
from tinylora_lite.files.basis import load_basis
from tinylora_lite.sampling.rollouts import encode_prompts
from tinylora_lite.tasks.datasets import load_task
from tinylora_lite.tasks.task import Example, Task
from tinylora_lite.utils import distributed
from tinylora_lite.utils.record import Run, atomic_write
from tinylora_lite.view.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Outcome:
    """The result of an experiment; all of it is in ``folder``, too.

    Attributes:
        settings: of the run that was chosen, where several learning rates were tried.
        run: its record.
        rates: the validation score of every learning rate that was tried; empty where there was one.
        base: the untouched base's scores, by the name of the task.
        adapted: the trained model's, on the same problems.
        vectors: v at the end, group by group; empty where all weights trained.
        folder: where everything is.
    """

    settings: RunSettings
    run: Run
    rates: dict[float, Score]
    base: dict[str, Score]
    adapted: dict[str, Score]
    vectors: tuple[float, ...]
    folder: Path

    @property
    def comparisons(self) -> dict[str, Comparison]:
        """The trained model against the base, by the name of the task."""
        return {name: compare(score, self.adapted[name]) for name, score in self.base.items()}

    def summary(self) -> dict[str, Any]:
        """What ``tinylora train --json`` prints and ``outcome.json`` keeps."""
        return {
            "model": self.settings.model,
            "task": self.settings.task,
            "method": self.settings.method,
            "trainer": self.settings.trainer,
            "adapter": self.run.adapter,
            "parameters": self.run.parameters,
            "learning_rate": self.run.settings["learning_rate"],
            "seed": self.run.seed,
            "temperature": self.settings.evaluation.temperature,
            "rates": {f"{rate:g}": score.summary() for rate, score in self.rates.items()},
            "base": {name: score.summary() for name, score in self.base.items()},
            "trained": {name: score.summary() for name, score in self.adapted.items()},
            "comparisons": {name: each.summary() for name, each in self.comparisons.items()},
            "seconds": round(self.run.seconds, 1),
            "folder": str(self.folder),
        }


def run_experiment(
    settings: RunSettings, *, progress: Progress | None = None, on_rollouts: OnRollouts | None = None
) -> Outcome:
    """Does what a settings file says.

    Of several learning rates the one with the best score on the validation split is taken; only the base and the model
    that it trained see the test split. The folder holds ``settings.yaml``, ``base/`` and ``trained/`` with every
    completion, ``run.json`` and ``checkpoint.pt`` of training (in a folder for each of several rates), the adapter as
    ``adapter.tinylora`` (all weights as a checkpoint in ``model/``), and ``outcome.json``.

    Several processes under ``accelerate launch`` share the work, and the first one writes the files.

    Args:
        settings: see :class:`~tinylora_lite.experiment.settings.RunSettings`.
        progress: where progress is shown; ``None`` shows nothing.
        on_rollouts: called in every step of GRPO with what was sampled and its rewards, ``[prompts, group_size]``.

    Raises:
        ValueError: settings that do not fit the model, the task or the content of the folder.
        OSError: the model, the data or the folder cannot be read or written.
        ImportError: an extra is missing that the settings ask for.
    """
    folder, progress = Path(settings.folder), progress or Progress()
    writes = distributed.rank() == 0
    _check_processes(settings, folder)
    folder.mkdir(parents=True, exist_ok=True)
    if writes and not (folder / "settings.yaml").exists():
        settings.save(folder / "settings.yaml")
    tasks = {name: task_named(name, settings) for name in (settings.task, *settings.evaluation.tasks)}
    tokenizer = load_tokenizer(settings.model, settings.revision)
    task = short_prompts(tasks[settings.task], tokenizer, settings.max_prompt_tokens)
    longest = None if settings.sampler.engine == "transformers" else _longest(settings, tasks, tokenizer)

    def load() -> Runner:
        return Runner.open(settings, tokenizer, progress, max_model_len=longest, lora_folder=folder / "lora")

    runner = load()

    def test(model: str) -> dict[str, Score]:
        return {
            name: runner.evaluate(f"{name}, {model}", tasks[name], settings.evaluation, folder=folder / model / name)
            for name in settings.evaluation.tasks
        }

    base = test("base")
    basis = _basis(runner, task, settings)
    runs, rates = settings.sweep(), {}
    for one in runs if len(runs) > 1 else ():
        with _trained(runner, task, one, basis, on_rollouts) as (_, run):
            kept = Path(one.folder) / "validation"
            score = runner.evaluate("validation", task, settings.evaluation, split="validation", folder=kept)
        rates[float(run.settings["learning_rate"])] = score
        if settings.adapter.kind == "all" or settings.shard:  # training changed the base itself
            del runner
            gc.collect()
            torch.cuda.empty_cache()
            runner = load()
    chosen = runs[0] if not rates else max(runs, key=lambda one: rates[one.training["learning_rate"]].accuracy)
    with _trained(runner, task, chosen, basis, on_rollouts) as (adapter, run):
        adapted = test("trained")
        vectors = () if adapter is None else tuple(adapter.vectors.flatten().tolist())
        outcome = Outcome(chosen, run, rates, base, adapted, vectors, folder)
        if writes and adapter is not None:
            save(adapter, folder / "adapter.tinylora", base_sha256=run.base)
        elif writes:
            runner.base.save_pretrained(folder / "model")
            runner.tokenizer.save_pretrained(folder / "model")
    if writes:
        settings.save(folder / "settings.yaml")  # again, with the settings that may differ between two calls
        atomic_write(folder / "outcome.json", json.dumps(outcome.summary(), indent=1) + "\n")
    distributed.barrier()
    return outcome


def task_named(name: str, settings: RunSettings) -> Task:
    """The task of a name: ``nano``, or one that :func:`~tinylora_lite.load_task` knows, from ``settings.data``."""
    if name == "nano":
        task: Task = nano_package().task()
        return task
    return load_task(name, data=settings.data, prompt=settings.prompt)


def _check_processes(settings: RunSettings, folder: Path) -> None:
    """Raises ``ValueError``, before anything large is loaded, where several processes cannot do what is asked for."""
    if distributed.world_size() == 1:
        return
    if settings.sampler.engine == "vllm":
        raise ValueError(
            "each process would need an engine of its own; start `tinylora serve` and set sampler.engine=vllm-server "
            "sampler.url=..., or train with one process"
        )
    if settings.adapter.projection == "calibrated" and not (folder / "basis.safetensors").exists():
        raise ValueError(
            f"a basis is calibrated by one process; run `tinylora calibrate {settings.model} --task {settings.task}` "
            f"first, with --out {folder / 'basis.safetensors'}"
        )


@contextmanager
def _trained(
    runner: Runner, task: Task, settings: RunSettings, basis: Basis | None, on_rollouts: OnRollouts | None
) -> Iterator[tuple[TinyLoraAdapter | None, Run]]:
    """Trains one learning rate, or takes up what its folder holds; the adapter stays on the model during the block."""
    config = settings.adapter.config(basis)
    adapter = None if config is None else attach(runner.base, config)
    try:
        if settings.shard and not distributed.is_sharded(runner.base):
            distributed.shard_model(runner.base)
        training = settings.training_settings(len(task.train))
        name, folder = f"{settings.method}, rate {training.learning_rate:g}", Path(settings.folder)
        options: dict[str, Any] = {"trainer": settings.trainer, "folder": folder, "on_rollouts": on_rollouts}
        yield adapter, runner.train(name, task, adapter, training, **options)
    finally:
        if adapter is not None:
            adapter.detach()


def _basis(runner: Runner, task: Task, settings: RunSettings) -> Basis | None:
    """The calibrated directions; new ones are made once and kept in the folder of the settings file."""
    a = settings.adapter
    if not a.calibrated:
        return None
    if a.projection != "calibrated":
        return load_basis(a.projection)
    file = Path(settings.folder) / "basis.safetensors"
    if file.exists():
        return load_basis(file)
    options = a.calibration.model_dump(exclude={"looks"}) | {"passes": a.calibration.looks}
    return runner.calibrate(task, file, rank=a.rank, directions=a.u, sigma=a.sigma, **options)


def short_prompts(task: Task, tokenizer: PreTrainedTokenizerBase, most: int) -> Task:
    """The task without the training and validation problems whose prompts have more than ``most`` tokens."""

    def short(examples: Sequence[Example]) -> tuple[Example, ...]:
        lengths = _lengths(tokenizer, task, examples)
        return tuple(example for example, length in zip(examples, lengths, strict=True) if length <= most)

    train = short(task.train)
    if not train:
        raise ValueError(f"no training problem of {task.name} fits max_prompt_tokens={most}; raise it")
    return replace(task, train=train, validation=short(task.validation))


def _longest(settings: RunSettings, tasks: Mapping[str, Task], tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of the longest prompt and completion together, in calibration, training and tests."""
    s, a = settings, settings.adapter
    trained = max(s.training_settings(1).max_new_tokens, a.calibration.max_new_tokens if a.calibrated else 1)
    tests = (_lengths(tokenizer, tasks[name], tasks[name].test[: s.evaluation.problems]) for name in s.evaluation.tasks)
    tested = max((length for lengths in tests for length in lengths), default=0) + s.evaluation.max_new_tokens
    return max(s.max_prompt_tokens + trained, tested)


def _lengths(tokenizer: PreTrainedTokenizerBase, task: Task, examples: Sequence[Example]) -> list[int]:
    """Tokens of each prompt."""
    chunks = (examples[start : start + 1000] for start in range(0, len(examples), 1000))
    masks = (encode_prompts(tokenizer, task, chunk)[1] for chunk in chunks)
    return [int(length) for mask in masks for length in mask.sum(dim=1)]
