"""Completions from a model, many at once, with the probability of every token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tinylora_lite.adapter.attached import parameters_stay, rows_of
from tinylora_lite.sampling.logprobs import read_prompts
from tinylora_lite.sampling.policy import draw, end_ids, keeps_everything, make_room, modes_kept, uniforms, with_cache
from tinylora_lite.sampling.rollouts import Rollouts
from tinylora_lite.sampling.start import after_start
from tinylora_lite.utils import distributed
from tinylora_lite.utils.distributed import is_sharded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tinylora_lite.adapter.adapter import TinyLoraAdapter


@dataclass(frozen=True)
class ModelSampler:
    """The model that trains answers itself, ``batch_size`` rows at a time, which limits the memory of keys and values.

    ``None`` decodes all rows together.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    batch_size: int | None = None

    def sync(self, adapter: TinyLoraAdapter | None) -> None:
        """Does nothing: the model carries the adapter."""

    def sample(self, prompt_ids: Tensor, prompt_mask: Tensor, *, first_row: int = 0, **options: Any) -> Rollouts:
        """As :func:`sample`."""
        size, parts = self.batch_size or len(prompt_ids), []
        for start in range(0, len(prompt_ids), size):
            prompts = prompt_ids[start : start + size], prompt_mask[start : start + size]
            parts.append(sample(self.model, self.tokenizer, *prompts, first_row=first_row + start, **options))
        return parts[0] if len(parts) == 1 else Rollouts.cat(parts, self.tokenizer.pad_token_id)


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int | Sequence[int] = 0,
    first_row: int = 0,
    adapters: Tensor | None = None,
) -> Rollouts:
    """One completion for each prompt, decoded together with a key-value cache that drops finished rows.

    Args:
        model: any causal language model of transformers, adapted or not; it samples in evaluation mode.
        tokenizer: its tokenizer.
        prompt_ids: ``[batch, prompt]`` int64, padded on the left; equal prompts are read once.
        prompt_mask: ``[batch, prompt]`` int64, 1 on prompt tokens.
        max_new_tokens: the length limit.
        temperature: divides the logits; 0 takes the likeliest token, and reports probabilities at temperature 1. No
            top-k or top-p: their renormalised probabilities would not be the trainer's.
        seed: of the draw. Every row has random numbers of its own, so what it draws does not depend on the other rows.
            Several seeds share the rows equally: those of the first come first.
        first_row: the place of this batch in a larger one that is sampled in parts.
        adapters: ``[batch]`` int64, the adapter of each row where the model carries a population.

    Raises:
        ValueError: ``max_new_tokens`` is below 1, or ``temperature`` below 0.
        FloatingPointError: the model puts out NaN, or an infinity that makes its probabilities NaN.
    """
    if max_new_tokens < 1 or temperature < 0:
        found = f"not {max_new_tokens} and {temperature}"
        raise ValueError(f"max_new_tokens must be at least 1 and temperature at least 0, {found}")
    device, count = prompt_ids.device, len(prompt_ids)
    ends = end_ids(model, tokenizer).to(device)
    exact = torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have nothing wider
    seeds = seed if isinstance(seed, Sequence) else [seed]
    if count % len(seeds):
        raise ValueError(f"{count} rows cannot be shared equally by {len(seeds)} seeds")
    streams = [(own, first_row + row) for own in seeds for row in range(count // len(seeds))]
    uniform = uniforms(streams, max_new_tokens).to(device, exact)
    ids = torch.full((count, max_new_tokens), tokenizer.pad_token_id, device=device)
    logprobs = torch.zeros(count, max_new_tokens, device=device)
    entropies = torch.zeros_like(logprobs)
    alive = torch.arange(count, device=device)  # rows of the batch that the cache still holds
    done = torch.zeros(count, dtype=torch.bool, device=device)
    position = prompt_mask.sum(dim=1, keepdim=True) - 1
    together = is_sharded(model)  # then every forward pass is one of all processes

    with modes_kept(model), parameters_stay():
        model.eval()
        logits, cache, attention, start = read_prompts(model, prompt_ids, prompt_mask, adapters)
        if keeps_everything(cache):
            make_room(cache, attention.shape[1] + max_new_tokens)
        for step in range(max_new_tokens):
            logits = logits.float() if temperature in (0, 1) else logits.float() / temperature
            # A softmax by hand: what it is made of gives draw, log-probability and entropy with fewer passes.
            apart = logits.sub_(logits.amax(dim=-1, keepdim=True))
            masses = apart.exp()
            total = masses.sum(dim=-1)
            if total.isnan().any():
                raise FloatingPointError("the model puts out NaN; lower the learning rate, or load it in a wider dtype")
            token = apart.argmax(-1, True) if temperature == 0 else draw(masses, uniform[alive, step])
            ids[alive, step] = token[:, 0]
            logprobs[alive, step] = apart.gather(1, token)[:, 0] - total.log()
            entropies[alive, step] = total.log() - apart.mul_(masses).nansum(dim=-1) / total  # 0 · -inf counts as 0
            done[alive] |= torch.isin(token[:, 0], ends)
            waiting = (~done).sum()
            if step + 1 == max_new_tokens or not (distributed.all_reduce(waiting) if together else waiting):
                break
            attention = torch.cat([attention, attention.new_ones(len(alive), 1)], dim=1)
            position = position + 1
            # Dropping copies the cache, as every step does anyway, so it pays as soon as a few rows go.
            keep = (~done[alive]).nonzero()[:, 0]
            if 0 < len(keep) <= 0.9 * len(alive):
                cache.reorder_cache(keep)  # type: ignore[arg-type]  # any tensor of indices will do
                alive, token, attention, position = (t[keep] for t in (alive, token, attention, position))
            with rows_of(None if adapters is None else adapters[alive]), after_start(model, start):
                logits = model(
                    input_ids=token,
                    attention_mask=attention,
                    position_ids=position,
                    **with_cache(model, cache),
                    use_cache=True,
                ).logits[:, -1]

    ended = torch.isin(ids[:, : step + 1], ends).long()
    mask = (ended.cumsum(dim=1) - ended == 0).long()  # rows that wait to be dropped go on after their end token
    width = int(mask.sum(dim=1).max())
    ids, mask = ids[:, :width], mask[:, :width]
    texts = tokenizer.batch_decode([row[m.bool()] for row, m in zip(ids, mask, strict=True)], skip_special_tokens=True)
    return Rollouts(
        prompt_ids,
        prompt_mask,
        ids.masked_fill(mask == 0, tokenizer.pad_token_id),
        mask,
        logprobs[:, :width] * mask,
        entropies[:, :width] * mask,
        ~done,
        [text.strip() for text in texts],
        adapters,
    )
