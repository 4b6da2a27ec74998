"""A settings file by TRL: its ``GRPOTrainer`` as it is, with the adapter as a LoRA and our optimizer.

Settings, prompts and their order, reward, loss, optimizer and learning rate are those of
:func:`~tinylora_lite.train_grpo`. With one sampler for both, v differs by rounding alone, until that changes a sampled
token. Without a ``sampler``, TRL's own generation answers, which reports no log-probabilities, so nothing corrects for
them. Dropout stays off in the model after training.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch

from tinylora_lite.adapter.adapter import TinyLoraAdapter
from tinylora_lite.adapter.weights import base_fingerprint
from tinylora_lite.engines.optimizer import TinyLoraAdamW, as_lora
from tinylora_lite.sampling.rollouts import Sampler
from tinylora_lite.sampling.sampler import ModelSampler
from tinylora_lite.tasks.task import Example, Task
from tinylora_lite.training.batches import draw_prompts, rollout
from tinylora_lite.training.grpo import GRPO
from tinylora_lite.training.loop import DEFAULTS, RECORDED_PARAMETERS
from tinylora_lite.training.settings import GRPOSettings
from tinylora_lite.utils import distributed
from tinylora_lite.utils.record import Run, base_gguf, check_same_run

try:
    from datasets import Dataset
    from transformers.trainer_callback import PrinterCallback, TrainerCallback
    from transformers.trainer_utils import get_last_checkpoint
    from transformers.utils.versions import require_version

    require_version("trl>=1.14")
    from trl import GRPOTrainer, __version__

    from tinylora_lite.engines.trl_config import COLUMNS, trl_config
except ImportError as error:
    raise ImportError('training with TRL needs trl 1.14 or newer: pip install "tinylora_lite[train]"') from error

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
    callbacks: Sequence[TrainerCallback] = (),
    **config: Any,
) -> Run:
    """Trains an adapter by TRL's GRPO; afterwards the model carries it with the v that was reached.

    Under ``accelerate launch`` every process calls this with the same arguments. Checkpoints are TRL's own: the LoRA
    as PEFT saves one, and v with its moments in the optimizer's state. A run that was interrupted goes on from the last
    of them. Arguments are those of :func:`~tinylora_lite.train_grpo`, except that ``sampler=None`` takes TRL's own
    generation, and evaluates with ours. ``callbacks`` are the trainer's; the logs that they see hold v. ``config`` is
    further fields of TRL's ``GRPOConfig``, such as ``report_to``.

    Raises:
        ValueError: as :func:`~tinylora_lite.train_grpo`, or a field in ``config`` that ``settings`` decide.
        RuntimeError: as :func:`~tinylora_lite.train_grpo`, or the installed TRL does not correct for the sampler.
        FloatingPointError: the gradient is not finite; the parameters stay those of the last update.
    """
    settings = settings or GRPOSettings()
    if settings.mini_batches > 1:
        raise ValueError("under TRL a step is one update of all its samples; set mini_batches=1, or train without TRL")
    objective = GRPO(model, tokenizer, adapter, task, [settings], sampler)
    if model.get_output_embeddings() in map(model.get_submodule, adapter.names):
        raise ValueError("TRL computes with the output layer's weight alone, so an adapter on it would not train")
    distributed.shard(settings.prompts_per_step, "prompts_per_step")
    known_as, parameters = adapter.identity(), adapter.num_parameters
    run = Run("grpo", asdict(settings), known_as, parameters, task.name, base_fingerprint(model))
    run.base_gguf = base_gguf(model)
    run.environment["trl"] = __version__
    if folder is not None and (saved := Path(folder) / RUN_FILE).exists():
        check_same_run(folder, Run.load(saved), run, DEFAULTS)
    # The prompts of all steps, in the order in which our loop draws them.
    drawn = draw_prompts(task.train, replace(settings, prompts_per_step=settings.steps * settings.prompts_per_step), 0)
    config.setdefault("disable_tqdm", not sys.stderr.isatty())
    args = trl_config(settings, folder, **config)
    objective.check_sampler()
    with as_lora(adapter) as lora, patch.object(model, "forward", model.forward):  # TRL puts its own there
        rate, decay, limit = settings.learning_rate, settings.weight_decay, settings.max_grad_norm
        optimizer = TinyLoraAdamW(lora.parameters(), rate, weight_decay=decay, adapter=adapter, max_grad_norm=limit)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: settings.learning_rate_at(step // settings.epochs_per_step) / rate
        )
        bridge = _Bridge(objective, optimizer, run, folder, on_step)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "You are using 'rollout_func'", UserWarning)
            trainer = GRPOTrainer(
                model=lora,
                reward_funcs=bridge.reward,
                args=args,
                train_dataset=Dataset.from_list([{"prompt": task.messages(e), "gold": e.gold} for e in drawn]),
                processing_class=tokenizer,
                callbacks=list(callbacks),
                rollout_func=None if sampler is None else bridge.answers,
            )
        trainer.optimizer, trainer.lr_scheduler = optimizer, schedule  # Trainer(optimizers=...) refuses them under FSDP
        trainer.remove_callback(PrinterCallback)
        trainer.callback_handler.callbacks.insert(0, bridge)  # trackers come after it, and get v
        if "ref" in lora.peft_config:  # a copy of the adapter as it starts; the reference is the base, as in our loop
            lora.delete_adapter("ref")
        bridge.ends = trainer.eos_token_ids
        if sampler is not None:  # TRL corrects for it as for its own vLLM; bridge.answers keeps it in step
            trainer.use_vllm, trainer._last_loaded_step = True, -1
            trainer.vllm_generation = SimpleNamespace(sync_weights=lambda: None)
            if settings.tis_cap is None:
                trainer.vllm_importance_sampling_clip_min = 1.0  # with a maximum of 1, a weight of 1 for every token
        fsdp_2 = trainer.is_fsdp_enabled and trainer.accelerator.state.fsdp_plugin.fsdp_version == 2
        if trainer.is_deepspeed_enabled or (trainer.is_fsdp_enabled and not fsdp_2):
            raise ValueError("DeepSpeed and FSDP 1 take B apart; use FSDP 2 (fsdp_version: 2), or neither")
        if fsdp_2 and isinstance(sampler, ModelSampler):
            raise ValueError("a model sharded by FSDP samples by TRL's generation (sampler=None), or by another engine")
        last = get_last_checkpoint(str(folder)) if folder is not None and Path(folder).is_dir() else None
        trainer.train(resume_from_checkpoint=last)
        return bridge.record(trainer.state)


class _Bridge(TrainerCallback):
    """What TRL asks of our task and sampler, and what our record takes from its log."""

    ends: tuple[int, ...] = ()

    def __init__(
        self,
        objective: GRPO,
        optimizer: TinyLoraAdamW,
        run: Run,
        folder: str | Path | None,
        on_step: Callable[[Run], None] | None,
    ) -> None:
        self.objective, self.optimizer, self.run, self.folder, self.on_step = objective, optimizer, run, folder, on_step

    def answers(self, prompts: list[list[dict[str, str]]], trainer: GRPOTrainer) -> dict[str, Any]:
        """The sampler's answers to this process's share of a step's prompts, which come once for every completion."""
        o, settings = self.objective, self.objective.shared
        examples = [Example(conversation[-1]["content"], "") for conversation in prompts[:: settings.group_size]]
        step = trainer.state.global_step // settings.epochs_per_step
        assert o.sampler is not None
        o.sampler.sync(o.adapter)  # type: ignore[arg-type]
        rollouts = rollout(o.model, o.tokenizer, o.task, examples, settings, step, o.sampler)
        lengths, prompt_rows = rollouts.lengths.tolist(), (rollouts.prompt_ids, rollouts.prompt_mask)
        return {
            "prompt_ids": [ids[kept.bool()].tolist() for ids, kept in zip(*prompt_rows, strict=True)],
            "completion_ids": [row[:n].tolist() for row, n in zip(rollouts.completion_ids, lengths, strict=True)],
            "logprobs": [row[:n].tolist() for row, n in zip(rollouts.logprobs, lengths, strict=True)],
        }

    def reward(
        self, completion_ids: list[list[int]], gold: list[str], log_metric: Callable[[str, float], None], **_: Any
    ) -> list[float]:
        """TRL's reward function: the task's reward; the log gets the means of the strict and the lenient one."""
        task = self.objective.task
        decoded = self.objective.tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        texts = [text.strip() for text in decoded]
        scores = list(map(task.score, texts, gold))
        log_metric("strict", fmean(scores))
        if task.lenient is not None:
            log_metric("lenient", fmean(map(task.lenient, texts, gold)))
        if task.formatted is not None:
            log_metric("formatted", fmean(map(task.formatted, texts)))
        if self.objective.shared.truncated == "score":
            return scores
        return [score if ids[-1] in self.ends else 0.0 for score, ids in zip(scores, completion_ids, strict=True)]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter() - self.record(state).seconds

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        settings = self.objective.shared
        step, rest = divmod(state.global_step, settings.epochs_per_step)
        if settings.evaluate_every and not rest and step % settings.evaluate_every == 0:
            state.log_history.append({"step": state.global_step, "evaluation": self.objective.validate()[0]})

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "reward" not in logs:
            return
        if self.objective.sampler is not None and COLUMNS["logprob_diff_mean"] not in logs:
            raise RuntimeError(f"TRL {__version__} does not correct for the sampler; 1.16, which is tested, does")
        v = self.optimizer.vectors.detach().flatten()
        row = {"norm": v.norm().item(), "gradient_norm": self.optimizer.gradient_norm}
        row |= {f"v{i}": value for i, value in enumerate(v.tolist())} if len(v) <= RECORDED_PARAMETERS else {}
        row["seconds"] = time.perf_counter() - self.started
        logs.update(row)
        state.log_history[-1] |= row
        if self.on_step is not None:
            self.on_step(self.record(state))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.folder is not None:
            self.record(state).save(Path(self.folder) / RUN_FILE)

    def record(self, state: Any) -> Run:
        """The run so far; one of our steps is ``epochs_per_step`` of TRL's."""
        epochs = self.objective.shared.epochs_per_step
        rows = [
            {"step": entry["step"] // epochs}
            | {ours: entry[theirs] for ours, theirs in COLUMNS.items() if theirs in entry}
            for entry in state.log_history
            if "reward" in entry
        ]
        evaluations = [
            {"step": entry["step"] // epochs} | entry["evaluation"]
            for entry in state.log_history
            if "evaluation" in entry
        ]
        return replace(self.run, steps=rows, evaluations=evaluations, seconds=rows[-1]["seconds"] if rows else 0.0)
