"""A settings file from beginning to end: score the base, train, score again, compare, and keep everything.

What the folder holds already is not done again, so the same call continues an interrupted run.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tinylora_lite.adapter.adapter import TinyLoraAdapter
from tinylora_lite.adapter.basis import Basis
from tinylora_lite.evaluation.compare import Comparison, compare
from tinylora_lite.evaluation.score import Score
from tinylora_lite.experiment.models import load_tokenizer, nano_package
from tinylora_lite.experiment.runner import Runner
from tinylora_lite.experiment.settings import RunSettings, load_settings
from tinylora_lite.files.adapter_file import save
from tinylora_lite.files.basis import load_basis
from tinylora_lite.sampling.rollouts import Rollouts
from tinylora_lite.tasks.catalog import PROBLEM_SETS
from tinylora_lite.tasks.datasets import load_task
from tinylora_lite.tasks.task import Example, Task
from tinylora_lite.utils import distributed
from tinylora_lite.utils.files import atomic_write
from tinylora_lite.utils.record import Run
from tinylora_lite.view.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Outcome:
    """The result of an experiment; all of it is in ``folder``, too.

    Attributes:
        settings, run: of the chosen learning rate, where several were tried.
        rates: the validation score of every learning rate that was tried; empty where there was one.
        base, adapted: scores on the same problems by the name of the task, of the untouched base and after training.
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
            **{name: getattr(self.settings, name) for name in ("model", "dtype", "task", "method", "trainer")},
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


def dtype_of(folder: Path) -> str | None:
    """The dtype of the run that a folder holds, with which it goes on; ``None`` where there is none."""
    saved = folder / "settings.yaml"
    found = load_settings(saved).dtype if saved.exists() else "auto"
    return None if found == "auto" else found


def run_experiment(
    settings: RunSettings,
    *,
    progress: Progress | None = None,
    on_rollouts: Callable[[Rollouts, Tensor], None] | None = None,
) -> Outcome:
    """Does what a settings file says; ``on_rollouts`` is :func:`~tinylora_lite.train_grpo`'s.

    Of several learning rates the one with the best score on the validation split is taken; only the base and the model
    that it trained see the test split. The folder holds ``settings.yaml``, ``base/`` and ``trained/`` with every
    completion, ``run.json`` and ``checkpoint.pt`` of training (in a folder for each of several rates), the adapter as
    ``adapter.tinylora`` (all weights as a checkpoint in ``model/``), and ``outcome.json``.

    Several processes under ``accelerate launch`` share the work, and the first one writes the files.

    Raises:
        ValueError: settings that do not fit the model, the task or the content of the folder.
        OSError: the model, the data or the folder cannot be read or written.
        ImportError: an extra is missing that the settings ask for.
    """
    folder, progress = Path(settings.folder), progress or Progress()
    settings = settings.with_dtype(dtype_of(folder) or ("bfloat16" if torch.cuda.is_available() else "float32"))
    writes = distributed.rank() == 0
    _check(settings, folder)
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

    config = settings.adapter.config(_basis(runner, task, settings))
    base = test("base")
    options: dict[str, Any] = {"trainer": settings.trainer, "shard": settings.shard, "on_rollouts": on_rollouts}

    def trained(one: RunSettings) -> AbstractContextManager[tuple[TinyLoraAdapter | None, Run]]:
        training = one.training_settings(len(task.train))
        name = f"{one.method}, rate {training.learning_rate:g}"
        return runner.trained(name, task, config, training, folder=Path(one.folder), **options)

    runs, rates = settings.sweep(), {}
    for one in runs if len(runs) > 1 else ():
        with trained(one) as (_, run):
            kept = Path(one.folder) / "validation"
            score = runner.evaluate("validation", task, settings.evaluation, split="validation", folder=kept)
        rates[float(run.settings["learning_rate"])] = score
        if config is None or settings.shard:  # training changed the base itself
            del runner
            gc.collect()
            torch.cuda.empty_cache()
            runner = load()
    chosen = runs[0] if not rates else max(runs, key=lambda one: rates[one.training["learning_rate"]].accuracy)
    with trained(chosen) as (adapter, run):
        adapted = test("trained")
        vectors = () if adapter is None else tuple(adapter.vectors.flatten().tolist())
        outcome = Outcome(chosen, run, rates, base, adapted, vectors, folder)
        if writes and adapter is not None:
            save(adapter, folder / "adapter.tinylora", base_sha256=run.base)
        elif writes:
            runner.base.save_pretrained(folder / "model")
            tokenizer.save_pretrained(folder / "model")
    if writes:
        settings.save(folder / "settings.yaml")  # again, with the settings that may differ between two calls
        atomic_write(folder / "outcome.json", json.dumps(outcome.summary(), indent=1) + "\n")
    distributed.barrier()
    return outcome


def task_named(name: str, settings: RunSettings) -> Task:
    """The task of a name, with ``settings.shots`` worked examples in its prompts.

    ``nano``, its word problems for real models (``words-1`` and so on, by their number of steps), or one that
    :func:`~tinylora_lite.load_task` knows, from ``settings.data``.
    """
    task: Task
    if name == "nano":
        task = nano_package().task()
    elif name.startswith("words-") and name[6:].isdigit():
        task = nano_package().word_problems(int(name[6:]))
    elif name not in PROBLEM_SETS:
        raise ValueError(f"there is no task {name!r}; there are nano, words-1 and so on, {', '.join(PROBLEM_SETS)}")
    else:
        task = load_task(name, data=settings.data, prompt=settings.prompt)
    return task.with_shots(settings.shots)


def _check(settings: RunSettings, folder: Path) -> None:
    """Raises ``ValueError``, before anything large is loaded, where the processes or the folder rule a run out."""
    other = "checkpoint.pt" if settings.trainer == "trl" else "checkpoint-*"
    if any(path for one in settings.sweep() for path in Path(one.folder).glob(other)):
        raise ValueError(f"{folder} holds a run of another trainer; give another folder, or delete that one")
    if distributed.world_size() == 1:
        return
    if settings.sampler.engine == "vllm":
        cure = "start `tinylora serve` and set sampler.engine=vllm-server sampler.url=..., or train with one process"
        raise ValueError(f"each process would need an engine of its own; {cure}")
    file = folder / "basis.safetensors"
    if settings.adapter.calibrated and settings.adapter.projection == "calibrated" and not file.exists():
        cure = f"start this run with one process until {file} is there, and then with several"
        raise ValueError(f"a basis is calibrated by one process; {cure}")


def _basis(runner: Runner, task: Task, settings: RunSettings) -> Basis | None:
    """The calibrated directions; new ones are made once and kept in the folder of the settings file."""
    a, file = settings.adapter, Path(settings.folder) / "basis.safetensors"
    if not a.calibrated:
        return None
    if a.projection != "calibrated" or file.exists():
        return load_basis(file if a.projection == "calibrated" else a.projection)
    options = a.calibration.model_dump(exclude={"looks"}) | {"passes": a.calibration.looks}
    return runner.calibrate(task, file, rank=a.rank, directions=a.u, sigma=a.sigma, **options)


def short_prompts(task: Task, tokenizer: PreTrainedTokenizerBase, most: int) -> Task:
    """The task without the training and validation problems whose prompts have more than ``most`` tokens."""
    splits: dict[str, Any] = {
        split: tuple(each for each in getattr(task, split) if _length(tokenizer, task, each) <= most)
        for split in ("train", "validation")
    }
    if not splits["train"]:
        raise ValueError(f"no training problem of {task.name} fits max_prompt_tokens={most}; raise it")
    return replace(task, **splits)


def _longest(settings: RunSettings, tasks: Mapping[str, Task], tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of the longest prompt and completion together, in calibration, training and tests."""
    s, a = settings, settings.adapter
    trained = max(s.training_settings(1).max_new_tokens, a.calibration.max_new_tokens if a.calibrated else 1)
    tested = [(tasks[name], each) for name in s.evaluation.tasks for each in tasks[name].test[: s.evaluation.problems]]
    longest = max((_length(tokenizer, task, each) for task, each in tested), default=0)
    return max(s.max_prompt_tokens + trained, longest + s.evaluation.max_new_tokens)


def _length(tokenizer: PreTrainedTokenizerBase, task: Task, example: Example) -> int:
    """Tokens of a prompt."""
    return len(tokenizer.apply_chat_template(task.messages(example), add_generation_prompt=True, return_dict=False))
