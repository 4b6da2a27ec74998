"""How many parameters a method trains on a model, counted from its configuration: no weight is loaded."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, get_args

from tinylora_lite.adapter.config import TinyLoraConfig
from tinylora_lite.adapter.tying import Tying, find_target_modules, groups_of
from tinylora_lite.adapter.weights import stored_parameters, weight_shape
from tinylora_lite.planning.shapes import without_weights

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

Method = Literal["full", "lora", "lora_xs", "vera", "tinylora"]


def count_parameters(
    model_or_config: nn.Module | PretrainedConfig,
    method: Method = "tinylora",
    *,
    rank: int | None = None,
    u: int = 1,
    n_tie: int | Literal["all"] = 1,
    tying: Tying = "tiled",
    target_modules: list[str] | None = None,
) -> int:
    """How many parameters a method trains.

    | method | parameters |
    |---|---|
    | ``"full"`` | every parameter of the model, biases and norms included, shared embeddings once |
    | ``"lora"`` | ``rank · (in + out)`` of every module |
    | ``"lora_xs"`` | ``rank²`` of every module |
    | ``"vera"`` | ``rank + out`` of every module: its vectors d ``[rank]`` and b ``[out]`` (arXiv 2310.11454) |
    | ``"tinylora"`` | ``u`` of every group of modules; the frozen rank does not matter |

    >>> from transformers import Qwen2Config
    >>> config = Qwen2Config(num_hidden_layers=28, hidden_size=64, num_attention_heads=4, vocab_size=99)
    >>> count_parameters(config, "tinylora", u=1, n_tie=16)
    13

    Args:
        model_or_config: a model, or a transformers configuration of a causal language model, which is built without
            weights.
        method: one of the table's.
        rank: of ``"lora"``, ``"lora_xs"`` and ``"vera"``.
        u: of ``"tinylora"``, as the next two; see :class:`~tinylora_lite.TinyLoraConfig`.
        n_tie: see ``u``.
        tying: see ``u``.
        target_modules: the adapted modules by name, of every method but ``"full"``; ``None`` takes q, k, v, o, gate,
            up and down of every block.

    Raises:
        ValueError: an unknown method or module name, a rank that is missing, or a setting outside its range.
    """
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {', '.join(get_args(Method))}, not {method!r}")
    settings = TinyLoraConfig(u=u, n_tie=n_tie, tying=tying, target_modules=target_modules)
    model = without_weights(model_or_config)
    if method == "full":
        return sum(math.prod(shape) for _, shape, _ in stored_parameters(model))
    targets = find_target_modules(model, settings.target_modules)
    if method == "tinylora":
        return u * len(set(groups_of(targets, n_tie, tying)))
    if type(rank) is not int or rank < 1:
        raise ValueError(f'"{method}" needs rank=, an integer of at least 1, not {rank!r}')
    shapes = [weight_shape(model.get_submodule(target.name)) for target in targets]
    if method == "lora":
        return sum(rank * (out_features + in_features) for out_features, in_features in shapes)
    if method == "vera":
        return sum(rank + out_features for out_features, _ in shapes)
    smallest = min(map(min, shapes))
    if rank > smallest:
        raise ValueError(f"LoRA-XS of rank={rank} needs weights of at least that size; the smallest side is {smallest}")
    return rank**2 * len(shapes)


def plan(model_or_config: nn.Module | PretrainedConfig, budget: int = 13, **settings: Any) -> TinyLoraConfig:
    """The settings that train at most ``budget`` parameters: the smallest ``n_tie`` that fits, and ``u = 1``.

    The paper advises a short v in many groups (section 7): in its figures 8 and 9 more groups do better than a longer
    v for fewer.

    Args:
        model_or_config: see :func:`count_parameters`.
        budget: how many parameters may train.
        settings: of the :class:`~tinylora_lite.TinyLoraConfig`, ``u`` among them, without ``n_tie``.

    Raises:
        ValueError: no ``n_tie`` fits the budget, or a setting is outside its range.
    """
    config = TinyLoraConfig(**settings)
    targets = find_target_modules(without_weights(model_or_config), config.target_modules)
    for n_tie in range(1, len(targets) + 1):
        least = config.u * len(set(groups_of(targets, n_tie, config.tying)))
        if least <= budget:
            return TinyLoraConfig(**settings, n_tie=n_tie)
    advice = ' or set tying="tiled"' if config.tying == "structured" else ""
    raise ValueError(
        f"{config.tying} tying with u={config.u} takes at least {least} parameters, budget={budget}; raise it{advice}"
    )
