"""The one place that evaluates, calibrates and trains: a settings file, the demo and ``tinylora eval`` use it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tinylora_lite.adapter.adapter import TinyLoraAdapter
from tinylora_lite.adapter.basis import Basis
from tinylora_lite.evaluation.evaluate import evaluate
from tinylora_lite.evaluation.score import Score
from tinylora_lite.experiment.models import checkpoint, is_nano, load_model
from tinylora_lite.experiment.settings import EvaluationSettings, RunSettings
from tinylora_lite.files.basis import load_basis, save_basis
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

OnRollouts = Callable[[Rollouts, Tensor], None]


@dataclass
class Runner:
    """A base, what answers for it, and where progress is shown.

    Attributes:
        model: the base, with the adapter that it carries; ``None`` if another engine answers for an untouched base.
        tokenizer: the base's.
        sampler: what answers.
        progress: told of every phase, step and score.
        batch_size: completions of an evaluation that are decoded together.
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

        Args:
            settings: of a run.
            tokenizer: the base's.
            progress: see the class.
            dtype: of the base, in place of the settings'; ``"auto"`` as ``load_model`` takes it.
            device: of the base; ``None`` takes the GPU if there is one.
            weights: ``False`` loads no model, because a vLLM engine answers for the untouched base.
            max_model_len: tokens of the longest prompt and completion, for vLLM; ``None`` takes the model's own limit.
            lora_folder: where LoRAs are written for a server to read; ``None`` takes the one for temporary files.
        """
        s, options, dtype = settings, settings.sampler, dtype or settings.dtype
        if dtype == "auto" and is_nano(s.model):
            dtype = "float32"  # as load_model does; vLLM would take the checkpoint's float16
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
            sampler = VllmSampler(
                checkpoint(s.model),
                tokenizer,
                sync=options.sync,
                max_model_len=max_model_len,
                gpu_memory_utilization=options.gpu_memory,
                tensor_parallel_size=options.tensor_parallel,
                dtype=dtype,
                max_lora_rank=s.adapter.rank,
                **engine,
            )
        batch_size = options.batch_size or (256 if options.engine == "transformers" else 1024)
        return cls(model, tokenizer, sampler, progress, batch_size)

    @property
    def base(self) -> PreTrainedModel:
        """The model. Raises ``ValueError`` if none is loaded."""
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
        seed: int = 0,
        folder: Path | None = None,
        subject: dict[str, str] | None = None,
    ) -> Score:
        """The score on the first problems of a split; several processes share the problems and return the same score.

        ``name`` is what progress shows. ``folder`` keeps completions, and an interrupted evaluation goes on there.
        The rest is as :func:`~tinylora_lite.evaluate` takes it.
        """
        problems = tuple(getattr(task, split)[: settings.problems])
        rank, processes = distributed.rank(), distributed.world_size()
        padded = problems + problems[-1:] * (-len(problems) % processes)
        changed: dict[str, Any] = {split: padded[rank::processes]}
        if self.model is not None and distributed.is_sharded(self.model):
            folder = None  # the processes compute together, so all of them must start from the same place: the start
        elif folder is not None and processes > 1:
            folder = folder / f"{rank + 1}-of-{processes}"
        self.progress.begin(f"testing: {name}", len(changed[split]) * settings.samples)
        score = evaluate(
            self.model,
            self.tokenizer,
            replace(task, **changed),
            split=split,
            samples=settings.samples,
            temperature=settings.temperature,
            max_new_tokens=settings.max_new_tokens,
            batch_size=self.batch_size,
            seed=seed,
            progress=self.progress.advance,
            sampler=self.sampler,
            folder=folder,
            subject=subject,
        )
        if processes > 1:
            parts, samples = [part.completions for part in distributed.all_gather_object(score)], settings.samples
            rows = (parts[i % processes][i // processes * samples :][:samples] for i in range(len(problems)))
            score = Score.of((completion for row in rows for completion in row), samples)
        self.progress.scored(name, score)
        return score

    def calibrate(self, task: Task, file: Path, **options: Any) -> Basis:
        """Makes a basis as :func:`~tinylora_lite.calibrate` does, from training problems, and writes it to ``file``."""
        self.progress.begin("calibrating a basis")
        basis = calibrate(
            self.base, self.tokenizer, task, sampler=self.sampler, progress=self.progress.advance, **options
        )
        if distributed.rank() == 0:
            save_basis(basis, file)
        distributed.barrier()
        return load_basis(file)

    def train(
        self,
        name: str,
        task: Task,
        adapter: TinyLoraAdapter | None,
        settings: GRPOSettings | SFTSettings,
        *,
        trainer: str = "own",
        folder: Path | None = None,
        on_rollouts: OnRollouts | None = None,
    ) -> Run:
        """Trains an adapter that the model carries, or all weights where ``adapter`` is ``None``.

        Args:
            name: of the run, as progress shows it.
            task: the problems and the reward.
            adapter: attached to the model.
            settings: of GRPO or SFT; their class says which of the two trains.
            trainer: ``"own"``, or ``"trl"`` for TRL's loop of GRPO.
            folder: where the run is kept and an interrupted one goes on; ``None`` keeps nothing.
            on_rollouts: see :func:`~tinylora_lite.train_grpo`; TRL's loop does not call it.
        """
        self.progress.begin(f"training: {name}", settings.steps)
        self.progress.steps = settings.steps
        self.progress.measure = measure = "reward" if isinstance(settings, GRPOSettings) else "loss"

        def on_step(run: Run) -> None:
            if "length" in run.steps[-1]:
                self.progress.lengths[name] = run.curve("length")
            vectors = [] if adapter is None else adapter.vectors.flatten().tolist()
            self.progress.step(name, run.curve(measure), vectors)

        common: dict[str, Any] = {"folder": folder, "on_step": on_step}
        if trainer == "trl":
            from tinylora_lite.training.trl import train_trl

            assert adapter is not None  # RunSettings rules the rest out
            assert isinstance(settings, GRPOSettings)
            sampler = None if isinstance(self.sampler, ModelSampler) else self.sampler
            return train_trl(self.base, self.tokenizer, adapter, task, settings, sampler=sampler, **common)
        common |= {"sampler": self.sampler, "progress": False}
        if isinstance(settings, SFTSettings):
            return train_sft(self.base, self.tokenizer, adapter, task, settings, **common)
        return train_grpo(self.base, self.tokenizer, adapter, task, settings, on_rollouts=on_rollouts, **common)
