"""Completions from a model, many at once, with the probability of every token.

Prompts that occur more than once (the groups of GRPO) are read once, in sampling and in training: their keys and
values are computed for one row and repeated for the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from tinylora_lite import processes
from tinylora_lite.logits import head_gives_logprobs, tokens_at_once
from tinylora_lite.members import rows_belong_to
from tinylora_lite.seeds import seed_of
from tinylora_lite.sharding import is_sharded
from tinylora_lite.tasks import Example, Task

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

    from tinylora_lite.adapter import TinyLoraAdapter


@dataclass(frozen=True)
class Rollouts:
    """A batch of prompts with one completion each, prompts padded on the left, completions on the right.

    Attributes:
        prompt_ids: ``[batch, prompt]`` int64 token ids.
        prompt_mask: ``[batch, prompt]`` int64, 1 on prompt tokens.
        completion_ids: ``[batch, tokens]`` int64, the end token included, padding after it.
        completion_mask: ``[batch, tokens]`` int64, 1 up to and including the end token.
        logprobs: ``[batch, tokens]`` float32, of each token as the sampler drew it, at its temperature; 0 on padding.
        entropies: ``[batch, tokens]`` float32, in nats, of the distribution each token was drawn from; 0 on padding.
            A sampler that keeps only the drawn token's probability puts ``-logprobs`` here, whose mean is the same.
        truncated: ``[batch]`` bool, where the length limit came before an end token.
        texts: the completions without special tokens.
        members: ``[batch]`` int64, whose rows these are where the model carries a population; ``None`` elsewhere.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    completion_ids: Tensor
    completion_mask: Tensor
    logprobs: Tensor
    entropies: Tensor
    truncated: Tensor
    texts: list[str]
    members: Tensor | None = None

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def lengths(self) -> Tensor:
        """``[batch]`` int64, tokens of each completion."""
        return self.completion_mask.sum(dim=1)

    def rows(self, index: Tensor) -> Rollouts:
        """Some of the rows, ``index [rows]`` int64, with the padding that none of them needs cut off."""
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
            None if self.members is None else self.members[index],
        )


class Sampler(Protocol):
    """Whatever answers prompts: the model that trains (:class:`ModelSampler`), or another engine that follows it."""

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
        """One completion for each row of prompts; see :func:`sample`, whose arguments and result these are."""
        ...


@dataclass(frozen=True)
class ModelSampler:
    """The model that trains answers itself, so there is nothing to keep in step.

    Attributes:
        model: see :func:`sample`.
        tokenizer: the model's.
        batch_size: rows decoded together, which limits the memory of keys and values; ``None`` decodes all of them.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    batch_size: int | None = None

    def sync(self, adapter: TinyLoraAdapter | None) -> None:
        """Does nothing: the adapter hangs on the model."""

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
        """Calls :func:`sample` for ``batch_size`` rows at a time."""
        size = self.batch_size or len(prompt_ids)
        parts = [
            sample(
                self.model,
                self.tokenizer,
                prompt_ids[start : start + size],
                prompt_mask[start : start + size],
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seed=seed,
                first_row=first_row + start,
            )
            for start in range(0, len(prompt_ids), size)
        ]
        return parts[0] if len(parts) == 1 else _joined(parts, prompt_ids, prompt_mask, self.tokenizer.pad_token_id)


def _joined(parts: list[Rollouts], prompt_ids: Tensor, prompt_mask: Tensor, pad: int) -> Rollouts:
    """Samples of consecutive rows as one batch."""
    width = max(part.completion_ids.shape[1] for part in parts)

    def column(name: str, value: float = 0) -> Tensor:
        tensors: list[Tensor] = [getattr(part, name) for part in parts]
        return torch.cat([nn.functional.pad(t, (0, width - t.shape[1]), value=value) for t in tensors])

    return Rollouts(
        prompt_ids,
        prompt_mask,
        column("completion_ids", pad),
        column("completion_mask"),
        column("logprobs"),
        column("entropies"),
        torch.cat([part.truncated for part in parts]),
        [text for part in parts for text in part.texts],
    )


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ``ValueError`` where a tokenizer lacks what sampling needs: pad token, end token, chat template."""
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end token, so completions would never stop; set tokenizer.eos_token")
    if tokenizer.pad_token_id is None:
        raise ValueError("the tokenizer has no pad token; set tokenizer.pad_token = tokenizer.eos_token")
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template; set tokenizer.chat_template")


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    examples: Sequence[Example],
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Prompts through the chat template: ids and mask, both ``[batch, prompt]`` int64, padded on the left.

    Raises:
        ValueError: the tokenizer has no pad token, no end token or no chat template.
    """
    check_tokenizer(tokenizer)
    texts = [
        tokenizer.apply_chat_template(task.messages(e), tokenize=False, add_generation_prompt=True) for e in examples
    ]
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row)
        mask[i, width - len(row) :] = 1
    return ids.to(device), mask.to(device)


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
    first_row: int = 0,
    members: Tensor | None = None,
    streams: Sequence[tuple[int, int]] | None = None,
) -> Rollouts:
    """One completion for each prompt, decoded together with a key-value cache that drops finished rows.

    Args:
        model: any causal language model of transformers, adapted or not. It samples in evaluation mode and is left in
            the mode it was in.
        tokenizer: its tokenizer.
        prompt_ids: ``[batch, prompt]`` int64, padded on the left; a prompt to be answered several times stands in
            several rows, and is read once.
        prompt_mask: ``[batch, prompt]`` int64, 1 on prompt tokens.
        max_new_tokens: the length limit.
        temperature: divides the logits; 0 takes the likeliest token, and reports probabilities at temperature 1. No
            top-k or top-p: their renormalised probabilities would not be the trainer's.
        seed: of the draw. Every row has random numbers of its own, so what it draws does not depend on its company.
        first_row: where this batch stands in a larger one that is sampled in parts.
        members: ``[batch]`` int64, who answers each row where the model carries a population.
        streams: a seed and a place for each row, in place of ``seed`` and of the rows' numbers from ``first_row``.

    Raises:
        ValueError: ``max_new_tokens`` is below 1, or ``temperature`` below 0.
        FloatingPointError: the model puts out NaN, or an infinity that makes its probabilities NaN.
    """
    if max_new_tokens < 1 or temperature < 0:
        raise ValueError(
            f"max_new_tokens must be at least 1 and temperature at least 0, not {max_new_tokens} and {temperature}"
        )
    device, count = prompt_ids.device, len(prompt_ids)
    ends = _end_ids(model, tokenizer).to(device)
    exact = torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have nothing wider
    streams = streams or [(seed, first_row + row) for row in range(count)]
    uniform = _uniform(streams, max_new_tokens).to(device, exact)
    ids = torch.full((count, max_new_tokens), tokenizer.pad_token_id, device=device)
    logprobs = torch.zeros(count, max_new_tokens, device=device)
    entropies = torch.zeros_like(logprobs)
    alive = torch.arange(count, device=device)  # rows of the batch that the cache still holds
    done = torch.zeros(count, dtype=torch.bool, device=device)
    attention, position = prompt_mask, prompt_mask.sum(dim=1, keepdim=True) - 1
    together = is_sharded(model)

    with modes_kept(model):
        model.eval()
        logits, cache = _read_prompts(model, prompt_ids, prompt_mask, members)
        for step in range(max_new_tokens):
            log_distribution = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)
            if log_distribution.isnan().any():
                raise FloatingPointError("the model puts out NaN; lower the learning rate, or load it in a wider dtype")
            distribution = log_distribution.exp()
            token = logits.argmax(-1, True) if temperature == 0 else _draw(distribution, uniform[alive, step])
            ids[alive, step] = token[:, 0]
            logprobs[alive, step] = log_distribution.gather(1, token)[:, 0]
            entropies[alive, step] = torch.special.entr(distribution).sum(dim=-1)
            done[alive] |= torch.isin(token[:, 0], ends)
            if step + 1 == max_new_tokens or _all_done(done, together):
                break
            attention = torch.cat([attention, attention.new_ones(len(alive), 1)], dim=1)
            position = position + 1
            # Dropping copies the cache, as every step does anyway, so it pays as soon as a few rows go.
            keep = (~done[alive]).nonzero()[:, 0]
            if 0 < len(keep) <= 0.9 * len(alive):
                cache.reorder_cache(keep)  # type: ignore[arg-type]  # any tensor of indices will do
                alive, token, attention, position = (t[keep] for t in (alive, token, attention, position))
            with rows_belong_to(None if members is None else members[alive]):
                logits = model(
                    input_ids=token,
                    attention_mask=attention,
                    position_ids=position,
                    past_key_values=cache,
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
        members,
    )


def _all_done(done: Tensor, together: bool) -> bool:
    """Whether every row has ended; where processes compute ``together``, whether every process's rows have."""
    waiting = (~done).sum()
    return int(processes.added(waiting) if together else waiting) == 0


def _uniform(streams: Sequence[tuple[int, int]], tokens: int) -> Tensor:
    """A random number in [0, 1) for every token of every row, ``[rows, tokens]`` float64, the same on every machine."""
    generator = torch.Generator()
    numbers = torch.empty(len(streams), tokens, dtype=torch.float64)
    for row, (seed, place) in zip(numbers, streams, strict=True):
        torch.rand(tokens, generator=generator.manual_seed(seed_of("row", seed, place)), out=row)
    return numbers


def _draw(distribution: Tensor, uniform: Tensor) -> Tensor:
    """The token at which the cumulative probability passes ``uniform [rows]``, ``[rows, 1]`` int64."""
    cumulative = distribution.to(uniform.dtype).cumsum(dim=-1)
    passed = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
    return passed.clamp(max=distribution.shape[-1] - 1)


def completion_logprobs(model: PreTrainedModel, rollouts: Rollouts, temperature: float = 1.0) -> Tensor:
    """Log-probabilities of the completion tokens, teacher-forced: ``[batch, tokens]`` float32, differentiable.

    Positions outside ``completion_mask`` hold numbers without meaning. Logits are computed for the completions
    only, and of many tokens in chunks (:mod:`tinylora_lite.logits`).
    """
    ids, tokens = rollouts.completion_ids, rollouts.completion_ids.shape[1]
    attention = torch.cat([rollouts.prompt_mask, rollouts.completion_mask], dim=1)
    positions = (attention.cumsum(dim=1) - 1).clamp(min=0)
    if not _can_share_prompts(model):
        with rows_belong_to(rollouts.members):
            return _logprobs_after(
                model,
                ids,
                temperature,
                input_ids=torch.cat([rollouts.prompt_ids, ids[:, :-1]], dim=1),
                attention_mask=attention[:, :-1],
                position_ids=positions[:, :-1],
                use_cache=False,
            )
    logits, cache = _read_prompts(model, rollouts.prompt_ids, rollouts.prompt_mask, rollouts.members)
    first = torch.log_softmax(logits.float() / temperature, dim=-1).gather(1, ids[:, :1])
    if tokens == 1:
        return first
    with rows_belong_to(rollouts.members):
        following = _logprobs_after(
            model,
            ids[:, 1:],
            temperature,
            input_ids=ids[:, :-1],
            attention_mask=attention[:, :-1],
            position_ids=positions[:, -tokens:-1],
            past_key_values=cache,
            use_cache=True,
        )
    return torch.cat([first, following], dim=1)


def _logprobs_after(model: PreTrainedModel, ids: Tensor, temperature: float, **inputs: Any) -> Tensor:
    """Log-probabilities of ``ids``, ``[batch, tokens]``, at the last places of what ``inputs`` hold."""
    tokens, at_once = ids.shape[1], tokens_at_once(model)
    if at_once is not None and ids.numel() > at_once:
        with head_gives_logprobs(model, ids, temperature, at_once):
            logprobs: Tensor = model(**inputs, logits_to_keep=tokens).logits[..., 0]
            return logprobs
    logits = model(**inputs, logits_to_keep=tokens).logits
    return torch.log_softmax(logits.float() / temperature, dim=-1).gather(2, ids[..., None])[..., 0]


def _read_prompts(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, members: Tensor | None = None
) -> tuple[Tensor, Cache]:
    """Logits after each prompt, ``[batch, vocabulary]``, and a cache of all prompts; equal prompts are read once."""
    from transformers import DynamicCache  # its modules take seconds, which import tinylora_lite should not

    whose = torch.zeros_like(ids[:, :1]) if members is None else members[:, None]
    distinct, place = torch.unique(torch.cat([whose, ids, mask], dim=1), dim=0, return_inverse=True)
    distinct_members, distinct_ids, distinct_mask = distinct.split([1, ids.shape[1], ids.shape[1]], dim=1)
    cache = DynamicCache(config=model.config)
    with rows_belong_to(None if members is None else distinct_members[:, 0]):
        logits = model(
            input_ids=distinct_ids,
            attention_mask=distinct_mask,
            position_ids=(distinct_mask.cumsum(dim=1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
    cache.reorder_cache(place)
    return logits[place], cache


def recomputes(module: nn.Module) -> bool:
    """Whether gradient checkpointing is on in this very module (transformers renames its own name for it)."""
    return bool(getattr(module, "gradient_checkpointing", False))


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Afterwards every module is in the mode, training or evaluation, that it was in before."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _can_share_prompts(model: PreTrainedModel) -> bool:
    """Whether gradients can pass through a cache: not in recomputed layers, and not in recurrent or windowed ones.

    Nor is it done where processes compute together: their numbers of forward passes would depend on their samples.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer

    recomputed = any(module.training and recomputes(module) for module in model.modules())
    return not (recomputed or is_sharded(model)) and all(
        type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers
    )


def _end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    configured = getattr(model.generation_config, "eos_token_id", None)
    ends = configured if isinstance(configured, list) else [configured]
    return torch.tensor(sorted({tokenizer.eos_token_id, *ends} - {None}))
