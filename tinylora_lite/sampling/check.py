"""Whose probabilities answer: the adapter's, the base's, or something between.

An engine that leaves the adapter out raises no error: its text is fluent, the loss is finite, and training learns
nothing. The check plants known parameters, lets the sampler answer, and compares the log-probabilities that it reports
with those that the model computes for the same tokens, with the adapter and without.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from tinylora_lite.sampling.logprobs import completion_logprobs
from tinylora_lite.sampling.policy import modes_kept
from tinylora_lite.sampling.rollouts import Rollouts, Sampler, encode_prompts
from tinylora_lite.utils import distributed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tinylora_lite.adapter.adapter import TinyLoraAdapter
    from tinylora_lite.tasks.task import Task

Verdict = Literal["adapter", "base", "mixed", "between", "stale", "temperature", "neither", "unclear"]

PROMPTS, EACH, TOKENS = 4, 2, 16
"""Prompts of a round, completions of each, and the tokens that these have at most."""
ARITHMETIC, OTHER_WEIGHTS = 0.03, 0.15
"""What programs with the same weights differ by, and from where on the weights are others.

In parts of the text's surprise, the mean -log p of its tokens. Measured on SmolLM2-135M, whose samples have 1.96 nats a
token: 0.017 in bfloat16, 0.026 in llama.cpp's Q4_1, 0.31 for weights rounded to NF4.
"""
SURPRISE = 0.05
"""Nats a token that this unit has at least: answers that are almost certain differ by rounding alone."""
COLDEST = 0.5
"""Lower temperatures are raised to it: answers that are almost certain show little of the probabilities."""
LEAST, MOST = 0.02, 0.25
"""How far v is planted from the base, in the same unit: at ten times the noise, where that is between the two."""

SENTENCES: dict[Verdict, str] = {
    "adapter": "The adapter answered.",
    "base": "The base answered: the LoRA is not applied. The engine must be started for LoRAs (vLLM: --enable-lora), "
    "load it at every sync, and be asked for it by name.",
    "mixed": "The adapter answered some requests, and the base the others. Every request must name the LoRA, and every "
    "replica of the engine must have loaded it.",
    "between": "A part of the adapter answered. Compare the LoRA's scale (alpha / r) and the modules that the engine "
    "adapts, empty its cache of prompts, and merge in a dtype that keeps the update.",
    "stale": "An earlier adapter answered: the engine kept what it loaded before. It needs a new name for every LoRA "
    "(or vLLM's load_inplace) and an empty cache of prompts.",
    "temperature": "The probabilities are those of temperature 1. Start vLLM with --logprobs-mode processed_logprobs.",
    "neither": "Neither the adapter nor the base answered. Compare the engine's weights, its quantization, and its "
    "tokens of the prompt, the start token included.",
    "unclear": "The adapter changes too little, beside what the two programs differ by, to say who answered.",
}


@dataclass(frozen=True)
class SamplerCheck:
    """Who answered; differences are absolute, in nats, means over the tokens. ``str()`` says it in words.

    Attributes:
        verdict: as :func:`judge` decides; ``"adapter"`` is as it should be.
        share: how much of the adapter answered: 0 is the base, 1 the adapter.
        error: two standard errors of ``share``.
        to_adapter, to_base: from the sampler's log-probabilities to the model's, with the adapter and without.
        apart: from the model's with the adapter to the model's without.
        noise: from the sampler to the model where both compute the base.
        tokens: how many were compared.
    """

    verdict: Verdict
    share: float
    error: float
    to_adapter: float
    to_base: float
    apart: float
    noise: float
    tokens: int

    def __str__(self) -> str:
        return f"{SENTENCES[self.verdict]} (share {self.share:.2f} ± {self.error:.2f}, {self.tokens} tokens)"


def judge(
    sampler: Tensor, adapter: Tensor, base: Tensor, mask: Tensor, noise: float, earlier: Tensor | None = None
) -> SamplerCheck:
    """Says who answered, from log-probabilities of the same tokens, each ``[rows, tokens]``.

    With x = adapter - base and y = sampler - base, the share s = Σxy / Σx² leaves ``y - sx`` unexplained. Let |·| be
    the mean absolute value over tokens, and limit = 3 noise + 0.05 |x|. The first line that holds decides:

    - ``unclear``: two standard errors of s exceed 0.3, or x is 0;
    - ``stale``: |sampler - earlier| ≤ limit, and less than |sampler - adapter| and |y|;
    - ``adapter``: |y - sx| ≤ limit, and s is 1, within 0.1 and its error;
    - ``base``: |y - sx| ≤ limit, and s is 0, within 0.1 and its error;
    - ``mixed``: every row is within limit of adapter or base, and some are of one alone, some of the other;
    - ``between``: |y - sx| ≤ |x| or ≤ limit;
    - ``neither``.

    Args:
        sampler: as the sampler reported them.
        adapter: of the model with the adapter, teacher-forced, at the sampler's temperature.
        base: of the model without.
        mask: 1 on the tokens to compare.
        noise: what the two programs differ by, in nats: |sampler - base| where both compute the base.
        earlier: of the model with the parameters of the sync before.
    """
    kept, counts = mask.bool(), mask.sum(dim=1)
    x, y = (torch.where(kept, each - base, 0.0).cpu().double() for each in (adapter, sampler))
    tokens, counts = max(1, int(counts.sum())), counts.clamp(min=1).cpu()

    def mean(difference: Tensor) -> float:
        return float(difference.abs().sum() / tokens)

    squares = x.square().sum().clamp(min=1e-12)
    share = float((x * y).sum() / squares)
    rest = y - share * x
    error = 2 * float((rest.square().sum() / squares / tokens).sqrt())
    limit = 3 * noise + 0.05 * mean(x)
    of_adapter, of_base = (difference.abs().sum(dim=1) / counts <= limit for difference in (y - x, y))
    verdict: Verdict = "neither"
    if error > 0.3 or not x.any():
        verdict = "unclear"
    elif earlier is not None and mean(torch.where(kept, sampler - earlier, 0.0)) <= min(limit, mean(y - x), mean(y)):
        verdict = "stale"
    elif mean(rest) <= limit and abs(share - 1) <= 0.1 + error:
        verdict = "adapter"
    elif mean(rest) <= limit and abs(share) <= 0.1 + error:
        verdict = "base"
    elif (of_adapter | of_base).all() and (of_adapter & ~of_base).any() and (of_base & ~of_adapter).any():
        verdict = "mixed"
    elif mean(rest) <= max(mean(x), limit):
        verdict = "between"
    return SamplerCheck(verdict, share, error, mean(y - x), mean(y), mean(x), noise, int(mask.sum()))


@torch.no_grad()
def check_sampler(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    adapter: TinyLoraAdapter,
    sampler: Sampler,
    task: Task,
    *,
    plant: bool = True,
    temperature: float = 1.0,
    max_new_tokens: int = TOKENS,
    seed: int = 0,
) -> SamplerCheck:
    """Finds out whether a sampler answers with the adapter that it is given.

    It answers the same prompts three times: as the base, with a planted v, and with -v, so that an engine which keeps
    what it loaded first is found too. v has a fixed direction, and a length at which the log-probabilities move far
    above the noise on the base. Afterwards, and where the sampler raises, v is what it was, bit for bit, and the
    sampler is in step with it.

    Args:
        model: the trainer's.
        tokenizer: the model's.
        adapter: attached to the model.
        sampler: what answers.
        task: its first training problems are the prompts.
        plant: ``False`` leaves v as it is and asks once, without a sync: for a server that somebody started with the
            adapter. ``ARITHMETIC`` stands for the noise.
        temperature: of the samples, at least ``COLDEST``.
        max_new_tokens: the length limit of a completion.
        seed: of the samples.

    Returns:
        The worst round, of the worst process. The answers of the base also decide: ``"temperature"`` where they are
        closer to those of temperature 1; and in place of ``"adapter"``, ``"between"`` and ``"unclear"``, ``"neither"``
        where they are farther from the model's than ``OTHER_WEIGHTS``.

    Raises:
        ValueError: the task has no training problems, or no answer holds a token; or as the sampler's methods.
    """
    task.check(evaluated=False)
    temperature = max(temperature, COLDEST)
    v, before, zero = adapter.vectors, adapter.vectors.clone(), torch.zeros_like(adapter.vectors)
    ids, mask = encode_prompts(tokenizer, task, task.train[:PROMPTS], next(model.parameters()).device)
    prompts = ids.repeat_interleave(EACH, dim=0), mask.repeat_interleave(EACH, dim=0)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}

    def answer(planted: Tensor) -> Rollouts:
        v.copy_(planted)
        sampler.sync(adapter if planted.any() else None)
        return sampler.sample(*prompts, **options)

    def scored(rollouts: Rollouts, planted: Tensor, at: float = temperature) -> Tensor:
        v.copy_(planted)
        return completion_logprobs(model, rollouts, at)

    def mean(difference: Tensor, rollouts: Rollouts) -> float:
        kept = difference[rollouts.completion_mask.bool()].abs()
        total, count = distributed.all_reduce(torch.stack([kept.sum(), torch.ones_like(kept).sum()]))
        return float(total / count)

    def judged(rollouts: Rollouts, now: Tensor, noise: float | None = None, then: Tensor | None = None) -> SamplerCheck:
        base, earlier = scored(rollouts, zero), None if then is None else scored(rollouts, then)
        noise = ARITHMETIC * mean(base, rollouts) if noise is None else noise
        return judge(rollouts.logprobs, scored(rollouts, now), base, rollouts.completion_mask, noise, earlier)

    def rounds() -> tuple[SamplerCheck, SamplerCheck, Verdict | None]:
        of_base = answer(zero)
        base = scored(of_base, zero)
        surprise, noise = max(SURPRISE, mean(base, of_base)), mean(of_base.logprobs - base, of_base)
        at_one = noise if temperature == 1 else mean(of_base.logprobs - scored(of_base, zero, 1.0), of_base)
        aim = min(max(LEAST * surprise, 10 * noise), MOST * surprise)
        planted = 0.01 * torch.randn(v.shape, generator=torch.Generator().manual_seed(0)).to(v)
        for _ in range(12):
            apart = mean(scored(of_base, planted) - base, of_base)
            if aim <= apart <= 2 * aim:
                break
            planted *= min(max(1.4 * aim / max(apart, 1e-12), 0.1), 10.0)
        one = judged(answer(planted), planted, noise)
        other = judged(answer(-planted), -planted, noise, planted)
        if noise > max(2 * at_one, ARITHMETIC * surprise):
            return one, other, "temperature"
        return one, other, "neither" if noise > OTHER_WEIGHTS * surprise else None

    def restore() -> None:
        v.copy_(before)
        sampler.sync(adapter if before.any() else None)

    with modes_kept(model):
        model.eval()
        if not plant:
            try:
                answers = sampler.sample(*prompts, **options)
                if not answers.completion_mask.any():
                    raise ValueError("no answer holds a token that can be told by its text; try another seed")
                return judged(answers, before)
            finally:
                v.copy_(before)
        try:
            *found, base_says = rounds()
        except BaseException:
            with suppress(Exception):  # whose cause is the error that is on its way
                restore()
            raise
    restore()

    def badness(found: SamplerCheck) -> int:
        return {"adapter": 0, "stale": 2}.get(found.verdict, 1)

    worst = max(found, key=badness)
    if base_says == "temperature" or (base_says and worst.verdict in ("adapter", "between", "unclear")):
        worst = replace(worst, verdict=base_says)
    everyone: list[SamplerCheck] = distributed.all_gather_object(worst)
    return max(everyone, key=badness)
