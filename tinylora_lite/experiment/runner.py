"""The one place that evaluates, calibrates and trains: a settings file, the demo and ``tinylora eval`` use it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tinylora_lite.adapter.adapter import TinyLoraAdapter, attach
from tinylora_lite.adapter.basis import Basis
from tinylora_lite.adapter.config import TinyLoraConfig
from tinylora_lite.evaluation.evaluate import evaluate
from tinylora_lite.evaluation.score import Score
from tinylora_lite.experiment.models import checkpoint, gguf_file, is_nano, load_model, own_dtype
from tinylora_lite.experiment.settings import EvaluationSettings, RunSettings
from tinylora_lite.files.basis import save_basis
from tinylora_lite.sampling.rollouts import Rollouts, Sampler
from tinylora_lite.sampling.sampler import ModelSampler
from tinylora_lite.tasks.task import Task
from tinylora_lite.training.calibrate import calibrate
from tinylora_lite.training.grpo import train_grpo
from tinylora_lite.training.settings import GRPOSettings, SFTSettings
from tinylora_lite.training.sft import train_sft
from tinylora_lite.utils import distributed
from tinylora_lite.utils.record import Run
from tinylora_lite.view.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
        dtype = own_dtype(s.model, dtype, s.revision)
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

            # The path of a folder of ours depends on the machine.
            served = None if is_nano(s.model) or gguf_file(s.model, s.revision) else s.model
            sampler = VllmServerSampler(str(options.url), tokenizer, model=served, folder=lora_folder)
        else:
            from tinylora_lite.sampling.vllm import VllmSampler

            engine: dict[str, Any] = {} if s.revision is None else {"revision": s.revision}
            engine |= {"gpu_memory_utilization": options.gpu_memory, "tensor_parallel_size": options.tensor_parallel}
            engine |= {"max_model_len": max_model_len, "dtype": dtype, "max_lora_rank": s.adapter.rank}
            sampler = VllmSampler(checkpoint(s.model, dtype, s.revision), tokenizer, sync=options.sync, **engine)
        batch_size = options.evaluated * (distributed.world_size() if torch.cuda.is_available() else 1)
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
        """The score on the first problems of a split, as :func:`~tinylora_lite.evaluate` finds it.

        ``name`` is what progress shows. ``folder`` keeps completions, and an interrupted evaluation goes on there.
        ``options`` are further arguments of :func:`~tinylora_lite.evaluate`.
        """
        self.progress.begin(f"testing: {name}", len(getattr(task, split)[: settings.problems]) * settings.samples)
        options |= settings.model_dump(include={"problems", "samples", "temperature", "max_new_tokens"})
        options |= {"split": split, "batch_size": self.batch_size, "sampler": self.sampler, "folder": folder}
        score = evaluate(self.model, self.tokenizer, task, progress=self.progress.advance, **options)
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
                from tinylora_lite.engines.trl import train_trl

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
