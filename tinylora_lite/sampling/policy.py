"""What sampling and training need of a model of transformers and its tokenizer: modes, cache, end tokens, draws, head.

The head's logits come in chunks, gone before the backward pass: with a vocabulary of 152,000 those of a completion of
4,096 tokens take 2.5 GB in float32, and their softmax and its gradient as much again: more than everything else that a
frozen model keeps for its backward pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tinylora_lite.utils.distributed import is_sharded
from tinylora_lite.utils.record import seed_of

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

LOGITS_AT_ONCE, ON_A_CPU = 1 << 27, 1 << 24
"""How many logits exist at a time: 883 tokens of Qwen2.5's vocabulary, 512 MiB in float32; 64 MiB on a CPU."""

BLOCK = 128
"""Tokens whose probabilities are added up first when one of them is drawn."""

PLAIN = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Model types of transformers whose logits are what the head puts out, and whose attention is a softmax and no more."""


@contextmanager
def ready_to_train(model: PreTrainedModel, parameters: Sequence[Tensor]) -> Iterator[None]:
    """Inside, ``parameters`` alone take gradients and dropout is off; afterwards flags and modes are as before.

    Where gradient checkpointing is on, dropout that a recomputed block calls as a function stays on (OPT has such).
    """
    flags, trained = [(p, p.requires_grad) for p in model.parameters()], set(map(id, parameters))
    for parameter, _ in flags:
        parameter.requires_grad_(id(parameter) in trained)
    try:
        with modes_kept(model):
            model.eval()
            for module in filter(recomputes, model.modules()):
                module.training = True  # transformers recomputes in training mode only
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Afterwards every module is in the mode, training or evaluation, that it was in before."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def recomputes(module: nn.Module) -> bool:
    """Whether gradient checkpointing is on in this very module (transformers renames its own name for it)."""
    return bool(getattr(module, "gradient_checkpointing", False))


def can_share_prompts(model: PreTrainedModel) -> bool:
    """Whether gradients can pass through a cache: not in recomputed layers, and not in recurrent or windowed ones.

    Where processes compute together, they would make different numbers of forward passes.
    """
    from transformers import DynamicCache

    recomputed = any(module.training and recomputes(module) for module in model.modules())
    return not (recomputed or is_sharded(model)) and keeps_everything(DynamicCache(config=model.config))


def keeps_everything(cache: Cache) -> bool:
    """Whether a cache holds keys and values of every token, as those of recurrent and windowed layers do not."""
    from transformers.cache_utils import DynamicLayer

    return all(type(layer) is DynamicLayer for layer in cache.layers)


def make_room(cache: Cache, places: int) -> None:
    """Gives a cache room for so many tokens in all: a step then writes its keys and values, and copies no others.

    Without it every step copies the whole cache, a fifth of the time of decoding. No gradient passes through.
    """
    rooms: dict[tuple[int, str], Tensor] = {}

    def write(index: int, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        layer: Any = cache.layers[index]
        for name, new in (("keys", keys), ("values", values)):
            held, room = getattr(layer, name), rooms.get((index, name))
            if room is None or held.data_ptr() != room.data_ptr():  # rows were chosen since
                room = rooms[index, name] = held.new_empty(*held.shape[:2], places, held.shape[3])
                room[:, :, : held.shape[2]] = held
            end = held.shape[2] + new.shape[2]
            room[:, :, held.shape[2] : end] = new
            setattr(layer, name, room[:, :, :end])
        return layer.keys, layer.values

    for index, layer in enumerate(cache.layers):
        layer.update = partial(write, index)  # type: ignore[union-attr, method-assign]


def with_cache(model: PreTrainedModel, cache: Cache) -> dict[str, Any]:
    """The argument that hands a model its cache: ``past_key_values`` before transformers 5.24, ``cache`` since."""
    renamed = "cache" in inspect.signature(type(model).forward).parameters
    return {"cache" if renamed else "past_key_values": cache}


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ``ValueError`` where a tokenizer lacks what sampling needs: pad token, end token, chat template."""
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end token, so completions would never stop; set tokenizer.eos_token")
    if tokenizer.pad_token_id is None:
        raise ValueError("the tokenizer has no pad token; set tokenizer.pad_token = tokenizer.eos_token")
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template; set tokenizer.chat_template")


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The tokens that end a completion, ``[ends]`` int64: the tokenizer's and those of the model's own settings."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ends = configured if isinstance(configured, list) else [configured]
    return torch.tensor(sorted({tokenizer.eos_token_id, *ends} - {None}))


def last(tokens: int, device: torch.device) -> Tensor:
    """The last places, as ``logits_to_keep`` of transformers takes them, ``[tokens]`` int64.

    As a number, it makes the head's input a view, which PyTorch multiplies by one copy of the head for every row.
    """
    return torch.arange(-tokens, 0, device=device)


def uniforms(streams: Sequence[tuple[int, int]], tokens: int) -> Tensor:
    """A random number in [0, 1) for every token of every row, ``[rows, tokens]`` float64, the same on every machine.

    A row's stream is known by a seed and the row's place.
    """
    generator = torch.Generator()
    numbers = torch.empty(len(streams), tokens, dtype=torch.float64)
    for row, (seed, place) in zip(numbers, streams, strict=True):
        torch.rand(tokens, generator=generator.manual_seed(seed_of("row", seed, place)), out=row)
    return numbers


def draw(masses: Tensor, uniform: Tensor) -> Tensor:
    """The token at which the cumulative probability passes ``uniform [rows]``, ``[rows, 1]`` int64.

    ``masses [rows, vocabulary]`` are the probabilities, or proportional to them.

    The block of tokens comes first, and then the token: adding all of a large vocabulary up in float64 takes as long as
    a third of a small model.
    """
    if missing := -masses.shape[-1] % BLOCK:
        masses = F.pad(masses, (0, missing))
    blocks = masses.unflatten(-1, (-1, BLOCK))
    block, rest = _passed(blocks.sum(dim=-1), uniform[:, None])
    token, _ = _passed(blocks.take_along_dim(block[..., None], dim=1)[:, 0], rest)
    return block * BLOCK + token


def _passed(masses: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """The place where the cumulative mass passes a share of all of it, and the share of that place's own mass."""
    cumulative = masses.to(share.dtype).cumsum(dim=-1)
    total = cumulative[:, -1:]
    # Less than all of it, also after rounding: the last place that is found has a mass.
    wanted = torch.minimum(share * total, total.nextafter(torch.zeros_like(total)))
    place = torch.searchsorted(cumulative, wanted, right=True)
    return place, (1 - (cumulative.gather(1, place) - wanted) / masses.gather(1, place)).clamp(min=0)


def next_logprobs(model: PreTrainedModel, ids: Tensor, temperature: float, **inputs: Any) -> Tensor:
    """Log-probabilities of ``ids``, ``[batch, tokens]``, at the last places of what ``inputs`` hold."""
    at_once, inputs["logits_to_keep"] = tokens_at_once(model), last(ids.shape[1], ids.device)
    if at_once is not None and ids.numel() > at_once:
        with head_gives_logprobs(model, ids, temperature, at_once):
            logprobs: Tensor = model(**inputs).logits[..., 0]
            return logprobs
    logits = model(**inputs).logits
    return torch.log_softmax(logits.float() / temperature, dim=-1).gather(2, ids[..., None])[..., 0]


def chosen_logprobs(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    ids: Tensor,
    temperature: float,
    at_once: int,
    frozen: bool,
) -> Tensor:
    """The log-probability of one token after each hidden state, ``[...]`` float32, differentiable.

    Args:
        head: hidden states ``[tokens, width]`` to logits ``[tokens, vocabulary]``.
        hidden: ``[..., width]``.
        ids: ``[...]`` int64.
        temperature: divides the logits.
        at_once: tokens whose logits exist at the same time.
        frozen: whether the head itself takes no gradient; then no logits are computed a second time.
    """

    def logprobs(hidden: Tensor, ids: Tensor) -> Tensor:
        distribution = torch.log_softmax(head(hidden).float() / temperature, dim=-1)
        return distribution.gather(1, ids[:, None])[:, 0]

    def piece(states: Tensor, tokens: Tensor) -> Tensor:
        if frozen:
            chosen: Tensor = _Chosen.apply(states, tokens, head, temperature)  # type: ignore[no-untyped-call]
            return chosen
        return cast(Tensor, checkpoint(logprobs, states, tokens, use_reentrant=False))

    pieces = zip(hidden.flatten(0, -2).split(at_once), ids.flatten().split(at_once), strict=True)
    return torch.cat([piece(*each) for each in pieces]).view(ids.shape)


class _Chosen(torch.autograd.Function):
    """The log-probabilities of tokens, with their gradient made on the way: logits are gone before the backward pass.

    A token's log-probability depends on its own hidden state alone, so that its gradient is that of the sum.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, ids: Tensor, head: Callable[[Tensor], Tensor], temperature: float) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        with torch.set_grad_enabled(wanted):
            states = hidden.detach().requires_grad_(wanted)
            logits = head(states)
        scaled = logits.detach().float() if temperature == 1 else logits.detach().float() / temperature
        distribution = torch.log_softmax(scaled, dim=-1)
        chosen = distribution.gather(1, ids[:, None])
        if wanted:
            slopes = distribution.exp_().neg_().scatter_add_(1, ids[:, None], torch.ones_like(chosen))
            slopes = slopes if temperature == 1 else slopes.div_(temperature)
            ctx.save_for_backward(*torch.autograd.grad(logits, states, slopes.to(logits.dtype)))
        return chosen[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        return (gradient[:, None] * slopes).to(slopes.dtype), None, None, None


def tokens_at_once(model: PreTrainedModel) -> int | None:
    """How many tokens' logits should exist at a time; ``None`` for a model whose head cannot be taken by itself.

    That is one that does something to its logits afterwards, or that has hooks on its head (an adapter's, for one).
    """
    head = model.get_output_embeddings()
    if head is None or head._forward_hooks or head._forward_pre_hooks or model.config.model_type not in PLAIN:
        return None
    most = min(LOGITS_AT_ONCE, ON_A_CPU) if model.device.type == "cpu" else LOGITS_AT_ONCE
    return max(1, most // int(model.config.vocab_size))


@contextmanager
def head_gives_logprobs(model: PreTrainedModel, ids: Tensor, temperature: float, at_once: int) -> Iterator[None]:
    """Inside, the ``logits`` of ``model`` are log-probabilities of ``ids``, ``[batch, tokens, 1]`` float32.

    The head is called from inside the model, where wrappers that gather weights for the forward pass expect it.
    """
    head = model.get_output_embeddings()
    replaced, forward = head.__dict__.get("forward"), head.forward
    frozen = not any(parameter.requires_grad for parameter in head.parameters())
    head.forward = lambda hidden: chosen_logprobs(forward, hidden, ids, temperature, at_once, frozen)[..., None]
    try:
        yield
    finally:
        if replaced is None:
            del head.forward
        else:
            head.forward = replaced
