"""Completions from a model, many at once, with the probability of every token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tinylora_lite.tasks import Example, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Rollouts:
    """A batch of prompts with one completion each, prompts padded on the left, completions on the right.

    Attributes:
        prompt_ids: ``[batch, prompt]`` token ids.
        prompt_mask: ``[batch, prompt]``, 1 on prompt tokens.
        completion_ids: ``[batch, tokens]``, the end token included.
        completion_mask: ``[batch, tokens]``, 1 up to and including the end token.
        logprobs: ``[batch, tokens]`` float32, of each token as the sampler drew it, at its temperature.
        entropies: ``[batch, tokens]`` float32, in nats, of the distribution that each token was drawn from.
        truncated: ``[batch]`` bool, where the length limit came before an end token.
        texts: the completions without special tokens.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    completion_ids: Tensor
    completion_mask: Tensor
    logprobs: Tensor
    entropies: Tensor
    truncated: Tensor
    texts: list[str]

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def lengths(self) -> Tensor:
        """``[batch]``, tokens of each completion."""
        return self.completion_mask.sum(dim=1)

    def rows(self, index: Tensor) -> Rollouts:
        """Some of the rows, with the padding that none of them needs cut off."""
        prompt = int(self.prompt_mask[index].sum(dim=1).max())
        tokens = int(self.lengths[index].max())
        return Rollouts(
            self.prompt_ids[index, -prompt:],
            self.prompt_mask[index, -prompt:],
            self.completion_ids[index, :tokens],
            self.completion_mask[index, :tokens],
            self.logprobs[index, :tokens],
            self.entropies[index, :tokens],
            self.truncated[index],
            [self.texts[i] for i in index.tolist()],
        )


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    examples: Sequence[Example],
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Prompts through the chat template: ids and mask, ``[batch, prompt]``, padded on the left.

    Raises:
        ValueError: the tokenizer has no pad token, no end token or no chat template.
    """
    check_tokenizer(tokenizer)
    texts = [
        tokenizer.apply_chat_template(task.messages(e), tokenize=False, add_generation_prompt=True)
        for e in examples
    ]
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row)
        mask[i, width - len(row) :] = 1
    return ids.to(device), mask.to(device)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ``ValueError`` where a tokenizer lacks what sampling needs."""
    if tokenizer.pad_token_id is None:
        raise ValueError(
            "the tokenizer has no pad token; set tokenizer.pad_token = tokenizer.eos_token"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no end token, so completions would never stop; set tokenizer.eos_token"
        )
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template; set tokenizer.chat_template")


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
) -> Rollouts:
    """One completion for each prompt, decoded together with a key-value cache that drops finished rows.

    Args:
        model: any causal language model of transformers, adapted or not.
        tokenizer: its tokenizer.
        prompt_ids, prompt_mask: ``[batch, prompt]``, padded on the left.
        max_new_tokens: the length limit.
        temperature: divides the logits; 0 takes the likeliest token. No top-k or top-p: their renormalised
            probabilities would not be the trainer's (research note in the book).
        seed: of the draw.
    """
    from transformers import (
        DynamicCache,
    )  # importing its modules takes seconds; import tinylora_lite should not

    device = prompt_ids.device
    count = len(prompt_ids)
    pad, ends = tokenizer.pad_token_id, _end_ids(model, tokenizer).to(device)
    generator = torch.Generator(device).manual_seed(seed)
    ids = torch.full((count, max_new_tokens), pad, device=device)
    logprobs = torch.zeros(count, max_new_tokens, device=device)
    entropies = torch.zeros_like(logprobs)
    mask = torch.zeros_like(ids)

    was_training = model.training
    model.eval()
    cache = DynamicCache(config=model.config)
    alive = torch.arange(count, device=device)  # rows of the batch that the cache still holds
    done = torch.zeros(count, dtype=torch.bool, device=device)
    attention = prompt_mask
    position = prompt_mask.cumsum(dim=1) - 1
    inputs, positions = prompt_ids, position.clamp(min=0)
    position = position[:, -1:]
    for step in range(max_new_tokens):
        output = model(
            input_ids=inputs,
            attention_mask=attention,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits = output.logits[:, -1].float()
        log_distribution = torch.log_softmax(logits / (temperature or 1.0), dim=-1)
        if temperature == 0:
            token = logits.argmax(dim=-1, keepdim=True)
        else:
            token = torch.multinomial(log_distribution.exp(), 1, generator=generator)
        open_rows = ~done[alive]
        rows = alive[open_rows]
        ids[rows, step] = token[open_rows, 0]
        logprobs[rows, step] = log_distribution.gather(1, token)[open_rows, 0]
        entropies[rows, step] = -(log_distribution.exp() * log_distribution).sum(dim=-1)[open_rows]
        mask[rows, step] = 1
        done[alive] |= torch.isin(token[:, 0], ends)
        if done.all():
            break
        position = position + 1
        attention = torch.cat([attention, attention.new_ones(len(alive), 1)], dim=1)
        # Dropping copies the cache, so it waits until it halves the work.
        keep = (~done[alive]).nonzero()[:, 0]
        if len(keep) <= len(alive) // 2:
            cache.batch_select_indices(keep)
            alive, token, attention, position = (
                alive[keep],
                token[keep],
                attention[keep],
                position[keep],
            )
        inputs, positions = token, position
    model.train(was_training)

    width = int(mask.sum(dim=1).max())
    ids, mask, logprobs, entropies = (
        tensor[:, :width] for tensor in (ids, mask, logprobs, entropies)
    )
    texts = tokenizer.batch_decode(
        [row[m.bool()] for row, m in zip(ids, mask, strict=True)], skip_special_tokens=True
    )
    return Rollouts(
        prompt_ids,
        prompt_mask,
        ids,
        mask,
        logprobs,
        entropies,
        ~done,
        [text.strip() for text in texts],
    )


def _end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    configured = getattr(model.generation_config, "eos_token_id", None)
    ends = configured if isinstance(configured, list) else [configured]
    return torch.tensor(sorted({tokenizer.eos_token_id, *(e for e in ends if e is not None)}))


def completion_logprobs(
    model: PreTrainedModel, rollouts: Rollouts, temperature: float = 1.0
) -> Tensor:
    """Log-probabilities of the completion tokens, teacher-forced: ``[batch, tokens]`` float32, differentiable.

    Positions outside ``completion_mask`` hold numbers without meaning. Logits are computed for the completions
    only: with a large vocabulary they are the largest tensor of all.
    """
    attention = torch.cat([rollouts.prompt_mask, rollouts.completion_mask], dim=1)
    logits = model(
        input_ids=torch.cat([rollouts.prompt_ids, rollouts.completion_ids], dim=1),
        attention_mask=attention,
        position_ids=(attention.cumsum(dim=1) - 1).clamp(min=0),
        use_cache=False,
        logits_to_keep=rollouts.completion_ids.shape[1] + 1,
    ).logits
    distribution = torch.log_softmax(logits[:, :-1].float() / temperature, dim=-1)
    return distribution.gather(2, rollouts.completion_ids[..., None])[..., 0]
