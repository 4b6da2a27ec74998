"""A settings file from beginning to end: score the base, train, score again, compare, and keep everything.

What the folder holds already is not done again, so the same call continues an interrupted run.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tinylora_lite.adapter.adapter import TinyLoraAdapter, attach
from tinylora_lite.adapter.config import TinyLoraConfig
from tinylora_lite.adapter.projection import Basis
from tinylora_lite.evaluation.compare import Comparison, compare
from tinylora_lite.evaluation.evaluate import evaluate
from tinylora_lite.evaluation.score import Score
from tinylora_lite.experiment.models import checkpoint, is_nano, load_model, load_tokenizer, nano_package
from tinylora_lite.experiment.settings import EvaluationSettings, RunSettings
from tinylora_lite.files.adapter_file import save
from tinylora_lite.files.basis import load_basis, save_basis
from tinylora_lite.sampling.rollouts import Rollouts, Sampler
from tinylora_lite.sampling.sampler import ModelSampler
from tinylora_lite.tasks.datasets import load_task
from tinylora_lite.tasks.task import Example, Task
from tinylora_lite.training.calibrate import calibrate
from tinylora_lite.training.grpo import train_grpo
from tinylora_lite.training.settings import GRPOSettings, SFTSettings
from tinylora_lite.training.sft import train_sft
from tinylora_lite.utils import distributed
from tinylora_lite.utils.record import Run, atomic_write
from tinylora_lite.view.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
            **{name: getattr(self.settings, name) for name in ("model", "task", "method", "trainer")},
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
    writes = distributed.rank() == 0
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


@dataclass
class Runner:
    """A base and what answers for it; evaluates, calibrates and trains for every command, and shows its progress.

    ``model`` is ``None`` where another engine answers for an untouched base. ``batch_size`` is of evaluations.
    """

    model: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase
    sampler: Sampler
    progress: Progress
    batch_size: int

    @classmethod
    def open(
        cls,
        settings: RunSettings,
        tokenizer: PreTrainedTokenizerBase,
        progress: Progress,
        *,
        dtype: str | None = None,
        device: str | None = None,
        weights: bool = True,
        max_model_len: int | None = None,
        lora_folder: Path | None = None,
    ) -> Runner:
        """Loads the base that the settings name, and makes the sampler that they ask for.

        ``dtype``, in place of the settings', and ``device`` are as ``load_model`` takes them. Without ``weights`` no
        model is loaded, since a vLLM engine answers for the untouched base. ``max_model_len`` is of prompt and
        completion together, for vLLM. ``lora_folder`` is where a server reads LoRAs; by default a temporary one.
        """
        s, options, dtype = settings, settings.sampler, dtype or settings.dtype
        if dtype == "auto" and is_nano(s.model):
            dtype = "float32"  # of its training; the checkpoint is in float16
        progress.begin(f"loading {s.model}")
        model = None
        if weights:
            model = load_model(s.model, dtype=dtype, device=device, revision=s.revision, quantize=s.quantize)
            if s.gradient_checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            if max_model_len is not None:
                max_model_len = min(max_model_len, model.config.max_position_embeddings)
        sampler: Sampler
        if options.engine == "transformers" and model is not None:
            sampler = ModelSampler(model, tokenizer, options.batch_size)
        elif options.engine == "vllm-server":
            from tinylora_lite.sampling.vllm_server import VllmServerSampler

            served = None if is_nano(s.model) else s.model  # the shipped folder's path depends on the machine
            sampler = VllmServerSampler(str(options.url), tokenizer, model=served, folder=lora_folder)
        else:
            from tinylora_lite.sampling.vllm import VllmSampler

            engine: dict[str, Any] = {} if s.revision is None else {"revision": s.revision}
            engine |= options.model_dump(include={"sync", "gpu_memory", "tensor_parallel"})
            engine |= {"max_model_len": max_model_len, "dtype": dtype, "max_lora_rank": s.adapter.rank}
            sampler = VllmSampler(checkpoint(s.model), tokenizer, **engine)
        batch_size = options.batch_size or (256 if options.engine == "transformers" else 1024)
        return cls(model, tokenizer, sampler, progress, batch_size)

    @property
    def base(self) -> PreTrainedModel:
        """The model, which must be loaded."""
        if self.model is None:
            raise ValueError("only a sampler answers here; load the model to calibrate or train")
        return self.model

    def evaluate(
        self,
        name: str,
        task: Task,
        settings: EvaluationSettings,
        *,
        split: str = "test",
        folder: Path | None = None,
        **options: Any,
    ) -> Score:
        """The score on the first problems of a split; several processes share the problems and return the same score.

        ``name`` is what progress shows. ``folder`` keeps completions, and an interrupted evaluation goes on there.
        ``options`` are further arguments of :func:`~tinylora_lite.evaluate`.
        """
        problems, samples = tuple(getattr(task, split)[: settings.problems]), settings.samples
        rank, processes = distributed.rank(), distributed.world_size()
        padded = problems + problems[-1:] * (-len(problems) % processes)
        changed: dict[str, Any] = {split: padded[rank::processes]}
        if self.model is not None and distributed.is_sharded(self.model):
            folder = None  # the processes compute together, so all of them must start from the same place: the start
        elif folder is not None and processes > 1:
            folder = folder / f"{rank + 1}-of-{processes}"
        self.progress.begin(f"testing: {name}", len(changed[split]) * samples)
        options |= settings.model_dump(include={"samples", "temperature", "max_new_tokens"})
        score = evaluate(
            self.model,
            self.tokenizer,
            replace(task, **changed),
            split=split,
            batch_size=self.batch_size,
            progress=self.progress.advance,
            sampler=self.sampler,
            folder=folder,
            **options,
        )
        if processes > 1:
            parts = [part.completions for part in distributed.all_gather_object(score)]
            rows = (parts[i % processes][i // processes * samples :][:samples] for i in range(len(problems)))
            score = Score.of((completion for row in rows for completion in row), samples)
        self.progress.scored(name, score)
        return score

    def calibrate(self, task: Task, file: Path, **options: Any) -> Basis:
        """Makes a basis as :func:`~tinylora_lite.calibrate` does, from training problems, and writes it to ``file``."""
        self.progress.begin("calibrating a basis")
        options |= {"sampler": self.sampler, "progress": self.progress.advance}
        basis = calibrate(self.base, self.tokenizer, task, **options)
        save_basis(basis, file)
        return basis

    @contextmanager
    def trained(
        self,
        name: str,
        task: Task,
        config: TinyLoraConfig | None,
        settings: GRPOSettings | SFTSettings,
        *,
        trainer: str = "own",
        shard: bool = False,
        folder: Path | None = None,
        on_rollouts: Callable[[Rollouts, Tensor], None] | None = None,
    ) -> Iterator[tuple[TinyLoraAdapter | None, Run]]:
        """Trains an adapter, which stays on the model during the block, or all weights where ``config`` is ``None``.

        ``name`` is what progress shows. The class of ``settings`` says whether GRPO or SFT trains; with ``trainer``
        ``"trl"`` TRL's loop does, which calls no ``on_rollouts``. ``shard`` spreads the base over the processes.
        """
        adapter = None if config is None else attach(self.base, config)
        progress = self.progress

        def on_step(run: Run) -> None:
            if "length" in run.steps[-1]:
                progress.lengths[name] = run.curve("length")
            vectors = [] if adapter is None else adapter.vectors.flatten().tolist()
            progress.step(name, run.curve(progress.measure), vectors)

        arguments: tuple[Any, ...] = (self.base, self.tokenizer, adapter, task, settings)
        options: dict[str, Any] = {"folder": folder, "on_step": on_step, "sampler": self.sampler}
        try:
            if shard and not distributed.is_sharded(self.base):
                distributed.shard_model(self.base)
            progress.begin(f"training: {name}", settings.steps)
            progress.steps = settings.steps
            progress.measure = "reward" if isinstance(settings, GRPOSettings) else "loss"
            if trainer == "trl":
                from tinylora_lite.training.trl import train_trl

                if isinstance(self.sampler, ModelSampler):
                    options["sampler"] = None  # TRL generates by itself
                yield adapter, train_trl(*arguments, **options)
            elif isinstance(settings, SFTSettings):
                yield adapter, train_sft(*arguments, **options, progress=False)
            else:
                yield adapter, train_grpo(*arguments, **options, progress=False, on_rollouts=on_rollouts)
        finally:
            if adapter is not None:
                adapter.detach()


def task_named(name: str, settings: RunSettings) -> Task:
    """The task of a name: ``nano``, or one that :func:`~tinylora_lite.load_task` knows, from ``settings.data``."""
    if name == "nano":
        task: Task = nano_package().task()
        return task
    return load_task(name, data=settings.data, prompt=settings.prompt)


def _basis(runner: Runner, task: Task, settings: RunSettings) -> Basis | None:
    """The calibrated directions; new ones are made once and kept in the folder of the settings file."""
    a, file = settings.adapter, Path(settings.folder) / "basis.safetensors"
    if not a.calibrated:
        return None
    if a.projection != "calibrated" or file.exists():
        return load_basis(file if a.projection == "calibrated" else a.projection)
    if distributed.world_size() > 1:
        raise ValueError(
            f"a basis is calibrated by one process; run `tinylora calibrate {settings.model} --task {settings.task}` "
            f"first, with --out {file}"
        )
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
