"""A settings file from beginning to end: score the base, train the numbers, score again, compare, keep everything.

Whatever is in the folder already is not done again, so the same call goes on where an interrupted one stopped.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tinylora_lite.adapter.adapter import TinyLoraAdapter, attach
from tinylora_lite.adapter.basis import Basis, load_basis, save_basis
from tinylora_lite.evaluation.compare import Comparison, compare
from tinylora_lite.evaluation.evaluate import evaluate
from tinylora_lite.evaluation.log import write_whole
from tinylora_lite.evaluation.score import Score
from tinylora_lite.experiment.models import is_nano, load_model
from tinylora_lite.experiment.settings import RunSettings
from tinylora_lite.files.adapter_file import save
from tinylora_lite.sampling.rollouts import Rollouts, Sampler, encode_prompts
from tinylora_lite.sampling.sampler import ModelSampler
from tinylora_lite.tasks.task import Example, Task
from tinylora_lite.training.calibrate import calibrate
from tinylora_lite.training.grpo import train_grpo
from tinylora_lite.training.settings import SFTSettings
from tinylora_lite.training.sft import train_sft
from tinylora_lite.utils import distributed
from tinylora_lite.utils.record import Run
from tinylora_lite.utils.sharding import is_sharded, shard
from tinylora_lite.view.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OnRollouts = Callable[[Rollouts, Tensor], None]


@dataclass(frozen=True)
class Outcome:
    """What came of an experiment; all of it lies in ``folder``, too.

    Attributes:
        settings: of the run that was chosen, where several learning rates were tried.
        run: its record.
        rates: the validation score of every learning rate that was tried; empty where there was one.
        base: the untouched base's scores, by the name of the task.
        adapted: the trained model's, on the same problems.
        vectors: v as it is in the end, group by group; empty where all weights trained.
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

    Of several learning rates the one with the best score on the validation split is taken; the test split is seen by
    the base and by that one alone. In the folder: ``settings.yaml``, ``base/`` and ``trained/`` with every completion,
    ``run.json`` and ``checkpoint.pt`` of training (in a folder for each rate, where there are several), the adapter as
    ``adapter.tinylora`` (all weights as a checkpoint in ``model/``), and ``outcome.json``.

    Where several processes run this under ``accelerate launch``, they share the work, and the first writes the files.

    Args:
        settings: see :class:`~tinylora_lite.experiment.settings.RunSettings`.
        progress: where to show how far it is; ``None`` shows nothing.
        on_rollouts: called in every step of GRPO with what was sampled and its rewards, ``[prompts, group_size]``.

    Raises:
        ValueError: settings that do not fit the model, the task or what the folder holds already.
        OSError: the model, the data or the folder cannot be read or written.
        ImportError: an extra is missing that the settings ask for.
    """
    folder, progress = Path(settings.folder), progress or Progress()
    _check_processes(settings, folder)
    folder.mkdir(parents=True, exist_ok=True)
    if distributed.rank() == 0 and not (folder / "settings.yaml").exists():
        settings.save(folder / "settings.yaml")
    bench = Workbench(settings, progress, on_rollouts)
    base = bench.evaluate("base", None)
    runs, rates = settings.sweep(), {}
    if len(runs) > 1:
        for one in runs:
            adapter, run = bench.train(one)
            rates[float(run.settings["learning_rate"])] = bench.validate(one, adapter)
            bench.clear(adapter)
    chosen = runs[0] if not rates else max(runs, key=lambda one: rates[one.training["learning_rate"]].accuracy)
    adapter, run = bench.train(chosen)
    adapted = bench.evaluate("trained", adapter)
    vectors = () if adapter is None else tuple(adapter.vectors.flatten().tolist())
    outcome = Outcome(chosen, run, rates, base, adapted, vectors, folder)
    if distributed.rank() == 0:
        if adapter is not None:
            save(adapter, folder / "adapter.tinylora", base_sha256=run.base)
        else:
            bench.model.save_pretrained(folder / "model")
            bench.tokenizer.save_pretrained(folder / "model")
        settings.save(folder / "settings.yaml")  # again: what may differ between two calls, may
        write_whole(folder / "outcome.json", json.dumps(outcome.summary(), indent=1) + "\n")
    bench.clear(adapter)
    distributed.barrier()
    return outcome


def _check_processes(settings: RunSettings, folder: Path) -> None:
    """Raises ``ValueError`` before anything large is loaded where several processes cannot do what is asked for."""
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


class Workbench:
    """What the runs of one settings file share: the model, the problems, the sampler, the basis; made when needed."""

    def __init__(
        self, settings: RunSettings, progress: Progress | None = None, on_rollouts: OnRollouts | None = None
    ) -> None:
        self.settings, self.folder = settings, Path(settings.folder)
        self.progress, self.on_rollouts = progress or Progress(), on_rollouts
        self._changed = (
            False  # whether the base is no longer as it was loaded: trained itself, or spread over processes
        )

    @cached_property
    def loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The base and its tokenizer."""
        s = self.settings
        self.progress.begin(f"loading {s.model}")
        model, tokenizer = load_model(s.model, dtype=s.dtype, revision=s.revision, quantize=s.quantize)
        if s.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model, tokenizer

    @property
    def model(self) -> PreTrainedModel:
        """The base, with whatever adapter it carries."""
        return self.loaded[0]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base's tokenizer."""
        return self.loaded[1]

    @cached_property
    def task(self) -> Task:
        """The problems to train and to choose on, less those whose prompts are longer than ``max_prompt_tokens``."""
        task = task_named(self.settings.task, self.settings)
        train, validation = self._short_enough(task.train, task), self._short_enough(task.validation, task)
        if not train:
            raise ValueError(
                f"no training problem of {task.name} fits max_prompt_tokens={self.settings.max_prompt_tokens}; raise it"
            )
        return replace(task, train=train, validation=validation)

    @cached_property
    def sampler(self) -> Sampler:
        """Who answers the prompts."""
        s = self.settings.sampler
        if s.engine == "transformers":
            return ModelSampler(self.model, self.tokenizer, s.batch_size)
        if s.engine == "vllm-server":
            from tinylora_lite.sampling.vllm_server import VllmServerSampler

            assert s.url is not None  # SamplerSettings sees to that
            served = None if is_nano(self.settings.model) else self.settings.model
            return VllmServerSampler(s.url, self.tokenizer, model=served, folder=self.folder / "lora")
        from tinylora_lite.sampling.vllm import VllmSampler

        weights: str | Path = self.settings.model
        if is_nano(self.settings.model):  # its folder holds a basis too, which vLLM would take for weights
            weights = self.folder / "base-weights"
            self.model.save_pretrained(weights)
        engine: dict[str, Any] = {} if self.settings.revision is None else {"revision": self.settings.revision}
        return VllmSampler(
            weights,
            self.tokenizer,
            sync=s.sync,
            max_model_len=min(self._longest(), self.model.config.max_position_embeddings),
            gpu_memory=s.gpu_memory,
            tensor_parallel=s.tensor_parallel,
            dtype=self.settings.dtype,
            max_lora_rank=self.settings.adapter.rank,
            **engine,
        )

    @cached_property
    def basis(self) -> Basis | None:
        """The calibrated directions; made in one pass, and kept in the folder, where the settings ask for new ones."""
        a = self.settings.adapter
        if not a.calibrated:
            return None
        if a.projection != "calibrated":
            return load_basis(a.projection)
        file = self.folder / "basis.safetensors"
        if not file.exists():
            c = a.calibration
            self.progress.begin("calibrating a basis")
            basis = calibrate(
                self.model,
                self.tokenizer,
                self.task,
                rank=a.rank,
                directions=a.u,
                sigma=a.sigma,
                problems=c.problems,
                group_size=c.group_size,
                passes=c.looks,
                max_new_tokens=c.max_new_tokens,
                seed=c.seed,
                progress=self.progress.advance,
                sampler=self.sampler,
            )
            if distributed.rank() == 0:
                save_basis(basis, file)
            distributed.barrier()
        return load_basis(file)

    def train(self, settings: RunSettings) -> tuple[TinyLoraAdapter | None, Run]:
        """Trains one learning rate, or takes up what its folder holds; the adapter stays on the model."""
        if self._changed:
            self.__dict__.pop("sampler", None)
            del self.loaded
            gc.collect()
            torch.cuda.empty_cache()
        config = settings.adapter.config(self.basis)
        self._changed = config is None or settings.shard
        adapter = None if config is None else attach(self.model, config)
        if settings.shard and not is_sharded(self.model):
            shard(self.model)
        training = settings.training_settings(len(self.task.train))
        rate, folder = training.learning_rate, Path(settings.folder)
        name = f"{settings.method}, rate {rate:g}"
        self.progress.begin(f"training: {name}", training.steps)
        self.progress.steps = training.steps

        def on_step(run: Run) -> None:
            key = "reward" if settings.method == "grpo" else "loss"
            if "length" in run.steps[-1]:
                self.progress.lengths[name] = run.curve("length")
            self.progress.step(name, run.curve(key), [] if adapter is None else adapter.vectors.flatten().tolist())

        if isinstance(training, SFTSettings):
            run = train_sft(
                self.model,
                self.tokenizer,
                adapter,
                self.task,
                training,
                sampler=self.sampler,
                folder=folder,
                on_step=on_step,
                progress=False,
            )
            return adapter, run
        if settings.trainer == "trl":
            from tinylora_lite.training.trl import train_trl

            assert adapter is not None  # RunSettings sees to that
            sampler = None if isinstance(self.sampler, ModelSampler) else self.sampler
            run = train_trl(
                self.model,
                self.tokenizer,
                adapter,
                self.task,
                training,
                sampler=sampler,
                folder=folder,
                on_step=on_step,
            )
            return adapter, run
        run = train_grpo(
            self.model,
            self.tokenizer,
            adapter,
            self.task,
            training,
            sampler=self.sampler,
            folder=folder,
            on_step=on_step,
            on_rollouts=self.on_rollouts,
            progress=False,
        )
        return adapter, run

    def clear(self, adapter: TinyLoraAdapter | None) -> None:
        """Takes the adapter off, so that the next one finds the base."""
        if adapter is not None:
            adapter.detach()

    def validate(self, settings: RunSettings, adapter: TinyLoraAdapter | None) -> Score:
        """The score on the validation split, by which learning rates are chosen."""
        return self._score("validation", self.task, Path(settings.folder) / "validation", adapter, "validation")

    def evaluate(self, name: str, adapter: TinyLoraAdapter | None) -> dict[str, Score]:
        """The scores on the test splits of ``evaluation.tasks``, by their names."""
        scores = {}
        for task_name in self.settings.evaluation.tasks:
            task = self.task if task_name == self.settings.task else task_named(task_name, self.settings)
            scores[task_name] = self._score(
                f"{task_name}, {name}", task, self.folder / name / task_name, adapter, "test"
            )
        return scores

    def _score(self, name: str, task: Task, folder: Path, adapter: TinyLoraAdapter | None, split: str) -> Score:
        e = self.settings.evaluation
        problems = tuple(getattr(task, split)[: e.problems])
        padded = problems + problems[-1:] * (-len(problems) % distributed.world_size())
        share = padded[distributed.rank() :: distributed.world_size()]
        if distributed.world_size() > 1:
            folder = folder / f"{distributed.rank() + 1}-of-{distributed.world_size()}"
        self.progress.begin(f"testing: {name}", len(share) * e.samples)
        changed: dict[str, Any] = {split: share}
        score = evaluate(
            self.model,
            self.tokenizer,
            replace(task, **changed),
            split=split,
            samples=e.samples,
            temperature=e.temperature,
            max_new_tokens=e.max_new_tokens,
            batch_size=self.settings.sampler.batch_size or (256 if isinstance(self.sampler, ModelSampler) else 1024),
            sampler=self.sampler,
            # Processes that compute together go on from the same place, which is the beginning.
            folder=None if is_sharded(self.model) else folder,
            progress=self.progress.advance,
        )
        if distributed.world_size() > 1:
            parts = [list(part.completions) for part in distributed.all_gather_object(score)]
            dealt = [parts[i % len(parts)][i // len(parts) * e.samples :][: e.samples] for i in range(len(problems))]
            score = Score.of((completion for each in dealt for completion in each), e.samples)
        self.progress.scored(name, score)
        return score

    def _lengths(self, examples: Sequence[Example], task: Task) -> list[int]:
        """Tokens of each prompt."""
        chunks = (examples[start : start + 1000] for start in range(0, len(examples), 1000))
        masks = (encode_prompts(self.tokenizer, task, chunk)[1] for chunk in chunks)
        return [int(length) for mask in masks for length in mask.sum(dim=1)]

    def _short_enough(self, examples: Sequence[Example], task: Task) -> tuple[Example, ...]:
        lengths = self._lengths(examples, task)
        return tuple(e for e, n in zip(examples, lengths, strict=True) if n <= self.settings.max_prompt_tokens)

    def _longest(self) -> int:
        """Tokens of the longest prompt and completion together, those of the test problems included."""
        s = self.settings
        training = s.training_settings(len(self.task.train))
        answer = max(training.max_new_tokens, s.adapter.calibration.max_new_tokens if s.adapter.calibrated else 1)
        tests = [self.task if name == s.task else task_named(name, s) for name in s.evaluation.tasks]
        prompts = [n for task in tests for n in self._lengths(task.test[: s.evaluation.problems], task)]
        return max(s.max_prompt_tokens + answer, max(prompts, default=0) + s.evaluation.max_new_tokens)


def task_named(name: str, settings: RunSettings) -> Task:
    """The problems of that name: the nano world's, or those of :mod:`tinylora_lite.tasks.datasets`."""
    if name == "nano":
        from tinylora_lite import nano

        return nano.task()
    from tinylora_lite.tasks.datasets import load_task

    return load_task(name, data=settings.data, prompt=settings.prompt)
