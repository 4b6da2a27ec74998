"""The same training by TRL: its ``GRPOTrainer`` with the adapter's parameters as the only ones that train.

TRL adds what our loop leaves out: ``accelerate`` with FSDP2, trackers, callbacks. Settings, prompts and their order,
reward, loss, Adam and learning rate are those of :func:`~tinylora_lite.train_grpo`. With one sampler for both, v
differs by rounding alone, until that changes a sampled token. Without a ``sampler``, TRL's own generation answers,
which reports no log-probabilities, so nothing corrects for them. Dropout stays off in the model after training.

v is no parameter of the model: every process holds all of it, and the optimizer averages the gradients.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch

from tinylora_lite.adapter.adapter import TinyLoraAdapter
from tinylora_lite.adapter.weights import base_fingerprint, base_gguf
from tinylora_lite.files.adapter_file import save
from tinylora_lite.files.file_format import read_file
from tinylora_lite.sampling.rollouts import Sampler
from tinylora_lite.sampling.sampler import ModelSampler
from tinylora_lite.tasks.task import Example, Task
from tinylora_lite.training.batches import draw_prompts, rollout
from tinylora_lite.training.grpo import GRPO
from tinylora_lite.training.loop import DEFAULTS, RECORDED_PARAMETERS, ready_to_train
from tinylora_lite.training.settings import GRPOSettings
from tinylora_lite.utils import distributed
from tinylora_lite.utils.record import Run, check_same_run

try:
    from datasets import Dataset
    from transformers.trainer_callback import PrinterCallback, TrainerCallback
    from transformers.trainer_utils import get_last_checkpoint
    from transformers.utils.versions import require_version

    require_version("trl>=1.14")
    from trl import GRPOTrainer, __version__

    from tinylora_lite.training.trl_config import COLUMNS, AdamOnV, trl_config
except ImportError as error:
    raise ImportError('training with TRL needs trl 1.14 or newer: pip install "tinylora_lite[train]"') from error

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ADAPTER_FILE = "adapter.tinylora"
"""The parameters of a checkpoint, in float32."""
RUN_FILE = "run.json"


def train_trl(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    adapter: TinyLoraAdapter,
    task: Task,
    settings: GRPOSettings | None = None,
    *,
    sampler: Sampler | None = None,
    folder: str | Path | None = None,
    on_step: Callable[[Run], None] | None = None,
    callbacks: list[TrainerCallback] | None = None,
    **config: Any,
) -> Run:
    """Trains an adapter by TRL's GRPO; arguments are those of :class:`TinyLoraGRPOTrainer`.

    Under ``accelerate launch`` every process calls this with the same arguments.

    Raises:
        RuntimeError: the installed TRL does not correct for the sampler.
        FloatingPointError: the gradient is not finite; the parameters stay those of the last update.
    """
    config |= {"sampler": sampler, "on_step": on_step, "callbacks": callbacks}
    trainer = TinyLoraGRPOTrainer(model, tokenizer, adapter, task, settings, folder=folder, **config)
    last = get_last_checkpoint(str(folder)) if folder is not None and Path(folder).is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    if folder is not None:
        trainer.save_model()
    return trainer.record()


class TinyLoraGRPOTrainer(GRPOTrainer):  # type: ignore[misc]
    """``GRPOTrainer`` for an adapter. Its checkpoints hold v and the optimizer's state, and no weights of the base.

    Arguments are those of :func:`~tinylora_lite.train_grpo`, except that ``sampler=None`` takes TRL's own generation,
    and evaluates with ours. The adapter is not on the output layer. ``callbacks`` are those of ``GRPOTrainer``;
    ``config`` is further fields of TRL's ``GRPOConfig``, such as ``report_to`` or ``use_cpu``.

    Raises:
        ValueError: as :func:`~tinylora_lite.train_grpo`, or a field in ``config`` that ``settings`` decide.
    """

    optimizer: Any
    lr_scheduler: Any

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        adapter: TinyLoraAdapter,
        task: Task,
        settings: GRPOSettings | None = None,
        *,
        sampler: Sampler | None = None,
        folder: str | Path | None = None,
        on_step: Callable[[Run], None] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        **config: Any,
    ) -> None:
        settings = settings or GRPOSettings()
        self.objective = GRPO(model, tokenizer, adapter, task, [settings], sampler)
        if model.get_output_embeddings() in map(model.get_submodule, adapter.names):
            raise ValueError("TRL reads the output layer's weight past its hooks, so an adapter on it would not train")
        self.adapter, self.task, self.settings, self.sampler = adapter, task, settings, sampler
        self.policy, self.tokenizer, self._on_step = model, tokenizer, on_step
        known_as, parameters = adapter.identity(), adapter.num_parameters
        self.run = Run("grpo", asdict(settings), known_as, parameters, task.name, base_fingerprint(model))
        self.run.base_gguf = base_gguf(model)
        self.run.environment["trl"] = __version__
        config.setdefault("disable_tqdm", not sys.stderr.isatty())
        # The prompts of all steps, in the order in which our loop draws them.
        everything = replace(settings, prompts_per_step=settings.steps * settings.prompts_per_step)
        drawn = draw_prompts(task.train, everything, 0)
        with warnings.catch_warnings(), patch.object(model, "forward", model.forward):  # TRL puts its own there
            warnings.filterwarnings("ignore", "You are using 'rollout_func'", UserWarning)
            super().__init__(
                model=model,
                reward_funcs=self._reward,
                args=trl_config(settings, folder, **config),
                train_dataset=Dataset.from_list([{"prompt": task.messages(e), "gold": e.gold} for e in drawn]),
                processing_class=tokenizer,
                callbacks=[*(callbacks or []), _Evaluation(self)],
                rollout_func=None if sampler is None else self._ask_sampler,
            )
            self._trl_forward = model.forward
        distributed.shard(settings.prompts_per_step, "prompts_per_step")
        self.remove_callback(PrinterCallback)
        self.args.beta = self.beta = settings.kl
        if settings.kl > 0:
            self.ref_model = adapter.disabled()(model.__call__)
        if sampler is not None:  # TRL corrects for it as for its own vLLM; _ask_sampler keeps it in step
            self.use_vllm, self._last_loaded_step = True, -1
            self.vllm_generation = SimpleNamespace(sync_weights=lambda: None)
            if settings.tis_cap is None:
                self.vllm_importance_sampling_clip_min = 1.0  # with a maximum of 1, a weight of 1 for every token
        fsdp_2 = self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.fsdp_version == 2
        if self.is_deepspeed_enabled or (self.is_fsdp_enabled and not fsdp_2):
            raise ValueError("DeepSpeed and FSDP 1 take over what trains; use FSDP 2 (fsdp_version: 2), or neither")
        if fsdp_2 and isinstance(sampler, ModelSampler):
            raise ValueError("a model sharded by FSDP samples by TRL's generation (sampler=None), or by another engine")
        if not fsdp_2:
            # No parameter of the model trains. DDP refuses such a model, and accelerate would wrap it on CPUs.
            self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)

    def _ask_sampler(self, prompts: list[list[dict[str, str]]], trainer: GRPOTrainer) -> dict[str, Any]:
        """The sampler's answers to this process's share of a step's prompts, which come once for every completion."""
        examples = [Example(conversation[-1]["content"], "") for conversation in prompts[:: self.settings.group_size]]
        step = self.state.global_step // self.settings.epochs_per_step
        assert self.sampler is not None
        self.sampler.sync(self.adapter)
        rollouts = rollout(self.policy, self.tokenizer, self.task, examples, self.settings, step, self.sampler)
        lengths, prompt_rows = rollouts.lengths.tolist(), (rollouts.prompt_ids, rollouts.prompt_mask)
        return {
            "prompt_ids": [ids[kept.bool()].tolist() for ids, kept in zip(*prompt_rows, strict=True)],
            "completion_ids": [row[:n].tolist() for row, n in zip(rollouts.completion_ids, lengths, strict=True)],
            "logprobs": [row[:n].tolist() for row, n in zip(rollouts.logprobs, lengths, strict=True)],
        }

    def _reward(
        self, completion_ids: list[list[int]], gold: list[str], log_metric: Callable[[str, float], None], **_: Any
    ) -> list[float]:
        """TRL's reward function: the task's reward; the log gets the means of the strict and the lenient one."""
        texts = [text.strip() for text in self.tokenizer.batch_decode(completion_ids, skip_special_tokens=True)]
        scores = list(map(self.task.score, texts, gold))
        log_metric("strict", fmean(scores))
        if self.task.lenient is not None:
            log_metric("lenient", fmean(map(self.task.lenient, texts, gold)))
        if self.task.formatted is not None:
            log_metric("formatted", fmean(map(self.task.formatted, texts)))
        if self.settings.truncated == "score":
            return scores
        ended = [ids[-1] in self.eos_token_ids for ids in completion_ids]
        return [score if end else 0.0 for score, end in zip(scores, ended, strict=True)]

    _reward.__name__ = "reward"  # in TRL's log

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """TRL's loss. Raises ``RuntimeError`` where it would leave out the correction for the sampler."""
        if self.sampler is not None and "importance_sampling_ratio" not in inputs:
            raise RuntimeError(f"TRL {__version__} does not correct for the sampler; 1.16, which is tested, does")
        return super().compute_loss(model, inputs, *args, **kwargs)

    def create_optimizer(self, model: Any = None) -> Any:
        """Adam on v alone."""
        if self.optimizer is None:
            self.adapter.to(self.args.device)
            # Empty until prepared: FSDP2 looks for each of an optimizer's parameters in the model, where v is not.
            self.optimizer = AdamOnV([{"params": []}], lr=self.settings.learning_rate)
            self.optimizer.max_norm = self.settings.max_grad_norm
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """The learning rate of our settings; TRL calls this when the optimizer is prepared."""
        if self.lr_scheduler is None:
            self.optimizer.param_groups[0]["params"] = [self.adapter.vectors]
            epochs, settings = self.settings.epochs_per_step, self.settings
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                self.optimizer, lambda step: settings.learning_rate_at(step // epochs) / settings.learning_rate
            )
        return self.lr_scheduler

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains; arguments are those of ``Trainer.train``.

        The model has TRL's forward pass only inside: a copy of the model would call the original's.
        """
        self._started = time.perf_counter()
        with (
            patch.object(self.policy, "forward", self._trl_forward),
            ready_to_train(self.policy, [self.adapter.vectors]),
        ):
            return super().train(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's log, and v: its norm, and every entry (``v0`` and so on) where they are few."""
        if "loss" in logs:
            v = self.adapter.vectors.detach().flatten()
            logs |= {"norm": v.norm().item(), "gradient_norm": self.optimizer.optimizer.gradient_norm}
            logs |= {f"v{i}": value for i, value in enumerate(v.tolist())} if len(v) <= RECORDED_PARAMETERS else {}
            logs["seconds"] = time.perf_counter() - self._started
        super().log(logs, start_time)
        if self._on_step is not None and "reward" in self.state.log_history[-1]:
            self._on_step(self.record())

    def record(self) -> Run:
        """The run so far; one of our steps is ``epochs_per_step`` of TRL's."""
        rows = [
            {"step": entry["step"] // self.settings.epochs_per_step}
            | {ours: entry[theirs] for ours, theirs in COLUMNS.items() if theirs in entry}
            for entry in self.state.log_history
            if "reward" in entry
        ]
        return replace(self.run, steps=rows, seconds=rows[-1]["seconds"] if rows else 0.0)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes ``adapter.tinylora`` and the run's record, and no weights of the base."""
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            save(self.adapter, folder / ADAPTER_FILE, "fp32", base_sha256=self.run.base)
            self.record().save(folder / RUN_FILE)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes none: TRL's would describe a model, and the folder holds an adapter."""

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # As Trainer does it without FSDP; with FSDP it would write the base.
        if self.args.should_save:
            torch.save(self.optimizer.state_dict(), Path(output_dir) / "optimizer.pt")
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            for name, target in (("optimizer.pt", self.optimizer), ("scheduler.pt", self.lr_scheduler)):
                target.load_state_dict(torch.load(Path(checkpoint) / name, weights_only=True, map_location="cpu"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Restores v and the record. Raises ``ValueError`` where they are damaged, or of another run."""
        folder = Path(resume_from_checkpoint)
        saved = Run.load(folder / RUN_FILE)
        check_same_run(folder, saved, self.run, DEFAULTS)
        with torch.no_grad():
            self.adapter.vectors.copy_(read_file(folder / ADAPTER_FILE)[1]["vectors"])
        self.run.evaluations = saved.evaluations
        self._started -= saved.seconds


class _Evaluation(TrainerCallback):
    """Evaluates after the steps for which the settings ask it."""

    def __init__(self, trainer: TinyLoraGRPOTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer, settings = self.trainer, self.trainer.settings
        step, rest = divmod(state.global_step, settings.epochs_per_step)
        if settings.evaluate_every and not rest and step % settings.evaluate_every == 0:
            trainer.run.evaluations.append({"step": step} | trainer.objective.validate()[0])
