"""Prompts in, completions out: the batch that every sampler fills, and who may fill it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tinylora_lite.sampling.policy import check_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tinylora_lite.adapter.adapter import TinyLoraAdapter
    from tinylora_lite.tasks.task import Example, Task

PROMPTS = ("prompt_ids", "prompt_mask")
COMPLETIONS = ("completion_ids", "completion_mask", "logprobs", "entropies")


@dataclass(frozen=True)
class Rollouts:
    """A batch of prompts with one completion each, prompts padded on the left, completions on the right.

    Attributes:
        prompt_ids: ``[batch, prompt]`` int64 token ids.
        prompt_mask: ``[batch, prompt]`` int64, 1 on prompt tokens.
        completion_ids: ``[batch, tokens]`` int64, the end token included, padding after it.
        completion_mask: ``[batch, tokens]`` int64, 1 up to and including the end token.
        logprobs: ``[batch, tokens]`` float32, of each token as the sampler drew it, at its temperature; 0 on padding.
        entropies: ``[batch, tokens]`` float32, in nats, of the distribution each token was drawn from, or its unbiased
            estimate ``-logprobs``; 0 on padding.
        truncated: ``[batch]`` bool, where the length limit came before an end token.
        texts: the completions without special tokens.
        adapters: ``[batch]`` int64, the adapter of each row where the model carries a population; ``None`` elsewhere.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    completion_ids: Tensor
    completion_mask: Tensor
    logprobs: Tensor
    entropies: Tensor
    truncated: Tensor
    texts: list[str]
    adapters: Tensor | None = None

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def lengths(self) -> Tensor:
        """``[batch]`` int64, tokens of each completion."""
        return self.completion_mask.sum(dim=1)

    def rows(self, index: Tensor) -> Rollouts:
        """Some of the rows, ``index [rows]`` int64, with the padding that none of them needs cut off."""
        prompt, tokens = int(self.prompt_mask[index].sum(dim=1).max()), int(self.lengths[index].max())
        cut = {name: getattr(self, name)[index, -prompt:] for name in PROMPTS}
        cut |= {name: getattr(self, name)[index, :tokens] for name in COMPLETIONS}
        adapters = None if self.adapters is None else self.adapters[index]
        texts = [self.texts[i] for i in index.tolist()]
        return Rollouts(**cut, truncated=self.truncated[index], texts=texts, adapters=adapters)

    @classmethod
    def cat(cls, parts: Sequence[Rollouts], pad: int) -> Rollouts:
        """Batches of one prompt width as one; ``pad`` fills token ids."""
        joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in (*PROMPTS, "truncated")}
        for name in COMPLETIONS:
            rows = [row for part in parts for row in getattr(part, name)]
            joined[name] = pad_sequence(rows, batch_first=True, padding_value=pad if name == "completion_ids" else 0)
        return cls(**joined, texts=[text for part in parts for text in part.texts])


class Sampler(Protocol):
    """What answers prompts: the model that trains (``ModelSampler``), or another engine that follows it."""

    def sync(self, adapter: TinyLoraAdapter | None) -> None:
        """From now on samples come from the base with ``adapter`` as it is now, or from the base alone (``None``)."""

    def sample(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        seed: int = 0,
        first_row: int = 0,
    ) -> Rollouts:
        """One completion for each row of prompts; arguments and result are those of ``sampler.sample``."""
        ...


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    examples: Sequence[Example],
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Prompts through the chat template: ids and mask, both ``[batch, prompt]`` int64, padded on the left."""
    check_tokenizer(tokenizer)
    texts = [
        tokenizer.apply_chat_template(task.messages(e), tokenize=False, add_generation_prompt=True) for e in examples
    ]
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return padded(rows, tokenizer, "left", device)


def padded(
    rows: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, side: str, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Token ids as one tensor and the mask of those that are no padding, both ``[rows, longest]`` int64."""
    ids = [torch.tensor(row) for row in rows]
    ones = [torch.ones_like(row) for row in ids]
    pad = partial(pad_sequence, batch_first=True, padding_side=side)
    return pad(ids, padding_value=tokenizer.pad_token_id).to(device), pad(ones).to(device)
