"""What passes between training and vLLM, in this process or over HTTP: token ids there, token ids and odds back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tinylora_lite.sampling.rollouts import Rollouts
from tinylora_lite.utils.record import seed_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tinylora_lite.adapter.adapter import TinyLoraAdapter

NOT_FINITE = "the model puts out NaN; lower the learning rate, or start vLLM in a wider dtype"

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks that vLLM keeps room for; a LoRA of another rank takes the next larger room."""


def room_for(rank: int) -> int:
    """The smallest room that holds a LoRA of a rank. Raises ``ValueError`` above the largest, and below 1."""
    if not 1 <= rank <= RANKS[-1]:
        raise ValueError(f"vLLM serves LoRAs of rank 1 to {RANKS[-1]}, not {rank}; synchronise merged weights instead")
    return min(room for room in RANKS if room >= rank)


def check_rank(adapter: TinyLoraAdapter, room: int) -> None:
    """Raises ``ValueError`` where an adapter's rank is above the room that the engine was started with."""
    rank = adapter.config.rank
    if rank > room:
        raise ValueError(
            f"the adapter is of rank {rank}, and vLLM was started with room for {room}; start it with "
            f"max_lora_rank={room_for(rank)}"
        )


def check_ends(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ``ValueError`` where a tokenizer has no end token, or nothing to pad with."""
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end token, so completions would never stop; set tokenizer.eos_token")
    if tokenizer.pad_token_id is None:
        raise ValueError("the tokenizer has no pad token; set tokenizer.pad_token = tokenizer.eos_token")


def prompt_rows(prompt_ids: Tensor, prompt_mask: Tensor) -> list[list[int]]:
    """The prompts' token ids without their padding; both arguments are ``[batch, prompt]``."""
    return [ids[mask.bool()].tolist() for ids, mask in zip(prompt_ids.cpu(), prompt_mask.cpu(), strict=True)]


def check_request(prompts: Sequence[list[int]], max_new_tokens: int, temperature: float, limit: int) -> None:
    """Raises ``ValueError`` where a setting is out of range, or a prompt and its completion exceed ``limit`` tokens."""
    if max_new_tokens < 1 or temperature < 0:
        raise ValueError(
            f"max_new_tokens must be at least 1 and temperature at least 0, not {max_new_tokens} and {temperature}"
        )
    longest = max(map(len, prompts))
    if longest + max_new_tokens > limit:
        raise ValueError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed vLLM's max_model_len of {limit}; "
            "ask for fewer, or start it with more"
        )


def row_seeds(rows: int, seed: int, first_row: int) -> list[int]:
    """A seed for every row, which stays its own when a batch is answered in parts or by several processes.

    >>> row_seeds(3, seed=7, first_row=0)[2] == row_seeds(1, seed=7, first_row=2)[0]
    True
    """
    return [seed_of("row", seed, first_row + row) for row in range(rows)]


def rollouts_of(
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    tokens: Sequence[Sequence[int]],
    logprobs: Sequence[Sequence[float]],
    truncated: Sequence[bool],
) -> Rollouts:
    """Answers in the form that training takes, on the device of the prompts.

    Args:
        tokenizer: pads and decodes.
        prompt_ids: ``[batch, prompt]`` int64, as they were asked.
        prompt_mask: ``[batch, prompt]`` int64, 1 on prompt tokens.
        tokens: of each row the completion, its end token included.
        logprobs: of each row one for each token, at the temperature of the draw.
        truncated: of each row whether the length limit came before an end token.

    Raises:
        FloatingPointError: a log-probability is not finite.
    """
    shape = len(tokens), max(map(len, tokens))
    ids = torch.full(shape, int(tokenizer.pad_token_id))
    mask, values = torch.zeros_like(ids), torch.zeros(shape)
    for row, (drawn, scored) in enumerate(zip(tokens, logprobs, strict=True)):
        if not all(map(math.isfinite, scored)):
            raise FloatingPointError(NOT_FINITE)
        ids[row, : len(drawn)] = torch.tensor(drawn)
        mask[row, : len(drawn)] = 1
        values[row, : len(drawn)] = torch.tensor(scored)
    device = prompt_ids.device
    texts = tokenizer.batch_decode([list(drawn) for drawn in tokens], skip_special_tokens=True)
    return Rollouts(
        prompt_ids,
        prompt_mask,
        ids.to(device),
        mask.to(device),
        values.to(device),
        -values.to(device),
        torch.tensor(list(truncated), device=device),
        [text.strip() for text in texts],
    )
