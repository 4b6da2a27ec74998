"""What a step trains on: prompts drawn, sampled and scored for GRPO, worked answers encoded for SFT."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tinylora_lite.sampling.rollouts import Rollouts, Sampler, check_tokenizer, encode_prompts
from tinylora_lite.sampling.sampler import ModelSampler
from tinylora_lite.tasks.task import Example, Task
from tinylora_lite.training.settings import GRPOSettings, SFTSettings
from tinylora_lite.utils import distributed
from tinylora_lite.utils.seeds import seed_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def draw_prompts(examples: Sequence[Example], settings: GRPOSettings | SFTSettings, step: int) -> list[Example]:
    """The prompts of a step: the training problems in an order of the seed's, reshuffled when all were used."""

    @cache
    def order(epoch: int) -> list[int]:
        return random.Random(seed_of("prompts", settings.seed, epoch)).sample(range(len(examples)), len(examples))

    first = step * settings.prompts_per_step
    places = (divmod(place, len(examples)) for place in range(first, first + settings.prompts_per_step))
    return [examples[order(epoch)[index]] for epoch, index in places]


def rollout(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    examples: list[Example],
    settings: GRPOSettings,
    step: int,
    sampler: Sampler | None = None,
) -> Rollouts:
    """``group_size`` completions of every prompt, those of one prompt in consecutive rows.

    Args:
        model: answers where there is no ``sampler``.
        tokenizer: the model's.
        task: knows the prompts' conversations.
        examples: this process's share of the step's prompts.
        settings: group size, length limit, temperature and seed.
        step: moves the seed.
        sampler: who answers, already in step with the policy.
    """
    ids, mask = encode_prompts(tokenizer, task, examples, next(model.parameters()).device)
    repeated = (tensor.repeat_interleave(settings.group_size, dim=0) for tensor in (ids, mask))
    return (sampler or ModelSampler(model, tokenizer)).sample(
        *repeated,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        seed=seed_of("rollout", settings.seed, step),
        first_row=distributed.rank() * len(examples) * settings.group_size,
    )


def score(rollouts: Rollouts, task: Task, examples: list[Example], settings: GRPOSettings) -> Tensor:
    """Rewards of a rollout, ``[prompts, group_size]`` float32. Raises ``ValueError`` where one is no finite number."""
    golds = [example.gold for example in examples for _ in range(settings.group_size)]
    rewards = torch.tensor([task.score(text, gold) for text, gold in zip(rollouts.texts, golds, strict=True)])
    if settings.truncated != "score":
        rewards[rollouts.truncated.cpu()] = 0.0
    return rewards.view(len(examples), settings.group_size)


def check_task(tokenizer: PreTrainedTokenizerBase, task: Task, settings: GRPOSettings) -> None:
    """Raises ``ValueError`` where training would fail for want of problems, tokens or a reward that is a number."""
    check_tokenizer(tokenizer)
    if not task.train:
        raise ValueError(f"task {task.name} has no training problems")
    if settings.evaluate_every and not task.validation:
        raise ValueError(f"task {task.name} has no validation problems; set evaluate_every=0")
    task.score("", task.train[0].gold)


def encode_solutions(
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    examples: Sequence[Example],
    device: torch.device | str = "cpu",
) -> Rollouts:
    """Worked answers as if a model had sampled them, the end token included; their log-probabilities are zeros.

    Prompt and answer become tokens apart from each other, as they do in sampling, where the answer follows a prompt
    whose tokens are fixed. What the chat template puts between them (a space, an empty thought) belongs to the answer.
    """
    prompt_ids, prompt_mask = encode_prompts(tokenizer, task, examples, device)
    solutions = _solution_ids(tokenizer, task, examples)
    ids = torch.full((len(solutions), max(map(len, solutions))), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for i, solution in enumerate(solutions):
        ids[i, : len(solution)] = torch.tensor(solution)
        mask[i, : len(solution)] = 1
    nothing = torch.zeros(ids.shape, device=device)
    return Rollouts(
        prompt_ids,
        prompt_mask,
        ids.to(device),
        mask.to(device),
        logprobs=nothing,
        entropies=nothing,
        truncated=torch.zeros(len(ids), dtype=torch.bool, device=device),
        texts=[_solution(example) for example in examples],
    )


def check_solutions(
    tokenizer: PreTrainedTokenizerBase, task: Task, examples: Sequence[Example], which: str, longest: int
) -> None:
    """Raises ``ValueError`` where imitation lacks an answer, or where one is longer than ``longest`` tokens."""
    if not examples:
        cure = "" if which == "training" else "; set evaluate_every=0"
        raise ValueError(f"task {task.name} has no {which} problems{cure}")
    for place, example in enumerate(examples):
        if example.solution is None:
            cure = "train with train_grpo, which needs none" if which == "training" else "set evaluate_every=0"
            raise ValueError(
                f"{which} problem {place + 1} of task {task.name} has no worked answer to imitate; "
                f"give Example(..., solution=...), or {cure}"
            )
    lengths = list(map(len, _solution_ids(tokenizer, task, examples)))
    if max(lengths) > longest:
        place = lengths.index(max(lengths))
        raise ValueError(
            f"the worked answer of {which} problem {place + 1} of task {task.name} has {lengths[place]} tokens, more "
            f"than max_new_tokens={longest}; raise max_new_tokens, or leave such problems out"
        )


def _solution(example: Example) -> str:
    if example.solution is None:
        raise ValueError("an example has no worked answer; give Example(..., solution=...)")
    return example.solution


def _solution_ids(tokenizer: PreTrainedTokenizerBase, task: Task, examples: Sequence[Example]) -> list[list[int]]:
    texts = []
    for example in examples:
        solution, asked = _solution(example).strip(), task.messages(example)
        prompt = str(tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True))
        answered = [*asked, {"role": "assistant", "content": solution}]
        whole = str(tokenizer.apply_chat_template(answered, tokenize=False))
        between, found, _ = whole.removeprefix(prompt).partition(solution)
        texts.append((between if found and whole.startswith(prompt) else "") + solution)
    return [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
