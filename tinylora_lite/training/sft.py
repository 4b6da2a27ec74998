"""Supervised finetuning: make worked answers likelier, token by token.

The paper's other way to train (section 6.1), and the one that needs more parameters. The model reads a prompt as
sampling would show it; the loss is the mean of ``-log p`` over all tokens of a step's worked answers, end tokens
included: GRPO with ``normalise="token"`` at ratio 1 and advantage 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tinylora_lite.sampling.logprobs import completion_logprobs
from tinylora_lite.sampling.rollouts import Rollouts, Sampler, encode_prompts, padded
from tinylora_lite.training.batches import Batch, draw_prompts, micro_batches
from tinylora_lite.training.loop import Objective, fit
from tinylora_lite.training.settings import GRPOSettings, SFTSettings
from tinylora_lite.utils import distributed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tinylora_lite.adapter.adapter import TinyLoraAdapter
    from tinylora_lite.tasks.task import Example, Task
    from tinylora_lite.utils.record import Run


class SFT(Objective[SFTSettings]):
    """Worked answers."""

    method = "sft"
    loss = GRPOSettings(tis_cap=None)

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        task, tokenizer = self.task, self.tokenizer
        self.settings = [own.in_steps(len(task.train)) for own in self.settings]
        self.shared = s = self.settings[0]
        self.validation = task.validation[: s.evaluate_problems]
        check_solutions(tokenizer, task, task.train, "training", s.max_new_tokens)
        if s.evaluate_every and not self.population:  # of a population accuracy alone is measured
            check_solutions(tokenizer, task, self.validation, "validation", s.max_new_tokens)

    def batch(self, step: int) -> Batch:
        """``prompts_per_step`` worked answers for each adapter; in each process, its share of them."""
        n, K = self.shared.prompts_per_step, len(self.settings)
        mine = distributed.shard(n, "prompts_per_step")
        examples = [e for own in self.settings for e in draw_prompts(self.task.train, own, step)[mine]]
        answers = encode_solutions(self.tokenizer, self.task, examples, next(self.model.parameters()).device)
        rows = len(answers) // K
        if self.population:
            answers = replace(answers, adapters=torch.arange(K).repeat_interleave(rows))
        tokens = distributed.all_reduce(answers.lengths.view(K, rows).sum(dim=1))
        ones, metrics = torch.ones_like(answers.logprobs[:, 0]), [{"length": count / n} for count in tokens.tolist()]
        return Batch(answers, ones, tokens.repeat_interleave(rows), ones.bool(), 0 * ones, tokens, metrics)

    def validate(self) -> list[dict[str, float]]:
        """The loss on worked answers, and with ``evaluate_accuracy`` the accuracy of sampled ones."""
        s, loss = self.shared, {}
        if not self.population:
            loss["loss"] = solution_loss(self.model, self.tokenizer, self.task, self.validation, s.micro_batch)
        if not (s.evaluate_accuracy or self.population):
            return [loss]
        return [loss | score.details() for score in self.scores()]


def train_sft(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    adapter: TinyLoraAdapter | None,
    task: Task,
    settings: SFTSettings | None = None,
    *,
    sampler: Sampler | None = None,
    folder: str | Path | None = None,
    on_step: Callable[[Run], None] | None = None,
    progress: bool = True,
) -> Run:
    """Trains an adapter on worked answers, or all weights of the model where ``adapter`` is ``None``.

    Arguments, result and errors are those of :func:`~tinylora_lite.train_grpo`. The answers are the ``solution`` of
    the training examples; ``sampler`` answers in evaluations.

    Returns:
        The :class:`~tinylora_lite.Run`: of each step ``loss`` (in nats for a token, before the update) and ``length``
        (mean tokens of an answer); of each evaluation ``loss`` (not of a population) and, with ``evaluate_accuracy``,
        what :meth:`~tinylora_lite.Score.details` holds.

    Raises:
        ValueError: an example has no solution or one longer than ``max_new_tokens``, too.
    """
    objective = SFT(model, tokenizer, adapter, task, [settings or SFTSettings()], sampler)
    return fit(objective, folder=folder, on_step=on_step and (lambda runs: on_step(runs[0])), progress=progress)[0]


@torch.no_grad()
def solution_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    examples: Sequence[Example],
    micro_batch: int = 64,
) -> float:
    """The mean of ``-log p`` over the tokens of the examples' worked answers, in nats. Raises as training does."""
    answers = encode_solutions(tokenizer, task, examples, next(model.parameters()).device)
    parts = map(answers.rows, micro_batches(answers.lengths, answers.lengths > 0, micro_batch))
    total = sum((completion_logprobs(model, part) * part.completion_mask).sum().item() for part in parts)
    return -total / int(answers.lengths.sum())


def encode_solutions(
    tokenizer: PreTrainedTokenizerBase, task: Task, examples: Sequence[Example], device: torch.device | str = "cpu"
) -> Rollouts:
    """Worked answers as if a model had sampled them, the end token included; their log-probabilities are zeros.

    Prompt and answer are tokenized apart, as in sampling, where the answer follows a prompt whose tokens are fixed.
    What the chat template puts between them (a space, an empty thought) belongs to the answer.
    """
    prompt_ids, prompt_mask = encode_prompts(tokenizer, task, examples, device)
    ids, mask = padded(_solution_ids(tokenizer, task, examples), tokenizer, "right", device)
    zeros = torch.zeros(ids.shape, device=device)
    texts = [example.solution or "" for example in examples]
    return Rollouts(prompt_ids, prompt_mask, ids, mask, zeros, zeros, zeros[:, 0].bool(), texts)


def check_solutions(
    tokenizer: PreTrainedTokenizerBase, task: Task, examples: Sequence[Example], which: str, longest: int
) -> None:
    """Raises ``ValueError`` where imitation lacks an answer, or where one is longer than ``longest`` tokens."""
    cure = "" if which == "training" else "; set evaluate_every=0"
    if not examples:
        raise ValueError(f"task {task.name} has no {which} problems{cure}")
    for place, example in enumerate(examples):
        if example.solution is None:
            named = f"{which} problem {place + 1} of task {task.name}"
            raise ValueError(f"{named} has no worked answer to imitate; give Example(..., solution=...){cure}")
    lengths = list(map(len, _solution_ids(tokenizer, task, examples)))
    if max(lengths) > longest:
        raise ValueError(
            f"the worked answer of {which} problem {lengths.index(max(lengths)) + 1} of task {task.name} has "
            f"{max(lengths)} tokens, more than max_new_tokens={longest}; raise it, or leave such problems out"
        )


def _solution_ids(tokenizer: PreTrainedTokenizerBase, task: Task, examples: Sequence[Example]) -> list[list[int]]:
    texts = []
    for example in examples:
        if example.solution is None:
            raise ValueError("an example has no worked answer; give Example(..., solution=...)")
        solution, asked = example.solution.strip(), task.messages(example)
        prompt = str(tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True))
        answered = [*asked, {"role": "assistant", "content": solution}]
        whole = str(tokenizer.apply_chat_template(answered, tokenize=False))
        between, found, _ = whole.removeprefix(prompt).partition(solution)
        texts.append((between if found and whole.startswith(prompt) else "") + solution)
    return [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
