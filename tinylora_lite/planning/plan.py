"""What a run will take, before it is paid for: memory, time, whether it fits, and what to change where it does not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tinylora_lite.experiment.settings import RunSettings
from tinylora_lite.experiment.settings_fields import SettingsError
from tinylora_lite.planning.estimate import Phase, Term, memory_terms, peak, trained_numbers, vllm_cache, weight_bytes
from tinylora_lite.planning.gpus import CARDS, Card, card_named
from tinylora_lite.planning.run_time import LENGTHS, PROMPT_SHARE, RunTime, run_time
from tinylora_lite.planning.shapes import ModelShape

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SPARE = 0.05
"""The share of a card that is left to CUDA's own needs and to memory in pieces too small to use."""
CONTEXT = 0.6 * 2**30
"""Bytes of CUDA's context and libraries."""


@dataclass(frozen=True)
class Plan:
    """What a run takes.

    Attributes:
        settings: of the run.
        card: the GPU.
        gpus: how many train, one process each.
        numbers: how many numbers train.
        terms: what takes memory on each card, and when.
        problems: what stands in the way, one sentence each; empty where the run fits.
        advice: settings that make it fit, each ``key=value``, checked together; empty where it fits already, or where
            none was found.
        time: where the seconds go.
        length: the mean tokens of a completion that the time supposes.
        price: of one card for one hour, in whatever money; ``None`` where nobody gave one.
    """

    settings: RunSettings
    card: Card
    gpus: int
    numbers: int
    terms: tuple[Term, ...]
    problems: tuple[str, ...]
    advice: tuple[str, ...]
    time: RunTime
    length: float
    price: float | None

    @property
    def peaks(self) -> dict[Phase, float]:
        """Bytes on each card in each phase, what is always there included."""
        return peak(list(self.terms))

    @property
    def capacity(self) -> float:
        """Bytes of a card that a run may take."""
        return usable(self.card)

    @property
    def fits(self) -> bool:
        """Whether it runs on this card."""
        return not self.problems

    @property
    def cost(self) -> tuple[float, float] | None:
        """What one run costs, in the price's money."""
        if self.price is None:
            return None
        hours = self.time.hours
        return hours.low * self.gpus * self.price, hours.high * self.gpus * self.price

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "model": self.settings.model,
            "card": asdict(self.card),
            "gpus": self.gpus,
            "numbers": self.numbers,
            "memory": [asdict(term) for term in self.terms],
            "peaks": self.peaks,
            "capacity": self.capacity,
            "fits": self.fits,
            "problems": list(self.problems),
            "advice": list(self.advice),
            "length": self.length,
            "time": asdict(self.time),
            "hours": asdict(self.time.hours),
            "runs": len(self.settings.sweep()),
            "cost": self.cost,
        }


def plan_run(
    settings: RunSettings,
    card: str | Card = "a100-80gb",
    *,
    gpus: int = 1,
    config: PretrainedConfig | None = None,
    length: float | None = None,
    problems: int | None = None,
    price: float | None = None,
) -> Plan:
    """Plans a run from shapes alone: no weight is read.

    Args:
        settings: of the run.
        card: a name of :data:`~tinylora_lite.planning.gpus.CARDS`, or a card.
        gpus: how many train.
        config: of the model; ``None`` knows some models by name, reads a folder, and asks the hub for others.
        length: mean tokens of a completion; see :func:`~tinylora_lite.planning.run_time.run_time`.
        problems: of the training split.
        price: of one card for one hour.

    Raises:
        ValueError: an unknown card or model, or ``gpus`` cannot share a step's prompts.
    """
    card = card_named(card) if isinstance(card, str) else card
    prompts = settings.training_settings(1).prompts_per_step
    if gpus < 1 or prompts % gpus:
        raise ValueError(f"prompts_per_step={prompts} cannot be shared by {gpus} GPUs")
    shape = ModelShape.of(config or _config(settings))
    found = tuple(_problems(settings, shape, card, gpus))
    limit = settings.training_settings(1).max_new_tokens
    return Plan(
        settings=settings,
        card=card,
        gpus=gpus,
        numbers=trained_numbers(settings, shape),
        terms=tuple(memory_terms(settings, shape, card.memory, gpus)),
        problems=found,
        advice=_advice(settings, shape, card, gpus) if found else (),
        time=run_time(settings, shape, card, processes=gpus, length=length, problems=problems),
        length=min(length or LENGTHS.get(settings.task, limit / 2), limit),
        price=price,
    )


def usable(card: Card) -> float:
    """Bytes of a card that a run may take."""
    return card.memory * (1 - SPARE) - CONTEXT


def cards_that_fit(settings: RunSettings, config: PretrainedConfig | None = None, gpus: int = 1) -> list[str]:
    """The names of the cards that a run fits on as it stands."""
    shape = ModelShape.of(config or _config(settings))
    return [name for name, card in CARDS.items() if not any(_problems(settings, shape, card, gpus))]


def assumptions(plan: Plan) -> list[str]:
    """What the time supposes, in words."""
    from tinylora_lite.planning import run_time as t

    said = [
        f"completions of {plan.length:,.0f} tokens and prompts of {PROMPT_SHARE} on average",
        f"training at {t.MATRIX_USE[1]:.0%} to {t.MATRIX_USE[0]:.0%} of {plan.card.matrix_rate / 1e12:,.0f} TFLOPS",
        f"decoding at {t.BANDWIDTH_USE[1]:.0%} to {t.BANDWIDTH_USE[0]:.0%} of {plan.card.bandwidth / 1e9:,.0f} GB/s",
        f"the longest completion of a batch {t.TAIL[0]:.0f} to {t.TAIL[1]:.0f} times the mean",
    ]
    if plan.settings.sampler.engine == "transformers":
        low, high = (1000 * seconds for seconds in t.LAYER_SECONDS)
        said.append(f"{low:g} to {high:g} ms for a layer in a decoding step of transformers, however few the rows")
    return [*said, "every group of answers counts; loading and the SVD are left out"]


def _problems(settings: RunSettings, shape: ModelShape, card: Card, gpus: int) -> Iterator[str]:
    terms = memory_terms(settings, shape, card.memory, gpus)
    for phase, needed in peak(terms).items():
        if needed > usable(card):
            has = f"{usable(card) / 2**30:.1f} GiB that a {card.name} has for it"
            yield f"{phase} takes {needed / 2**30:.1f} GiB of the {has}"
    limit = settings.training_settings(1).max_new_tokens
    if settings.max_prompt_tokens + limit > shape.positions:
        yield (
            f"the model has {shape.positions:,} positions, fewer than max_prompt_tokens={settings.max_prompt_tokens} "
            f"and max_new_tokens={limit} together"
        )
    if gpus > 1 and settings.sampler.engine == "vllm":
        yield "an engine lives in one process; several share a server: set sampler.engine=vllm-server"
    if settings.shard and weight_bytes(settings, shape) > usable(card):
        yield "each process loads the whole base before it is spread, and the card does not hold it"
    if settings.dtype == "bfloat16" and not card.bfloat16:
        yield f"a {card.name} does not multiply bfloat16; set dtype=float16"
    if settings.method == "grpo" and settings.sampler.engine != "transformers":
        room = vllm_cache(settings, shape, card.memory)
        if room < settings.max_prompt_tokens + limit:
            yield (
                f"vLLM's {settings.sampler.gpu_memory:.0%} of the card hold its weights and the cache of "
                f"{max(0, int(room)):,} tokens, fewer than one longest sequence"
            )
    if settings.shard and gpus == 1:
        yield "shard spreads the weights over several GPUs, and there is one"


def _advice(settings: RunSettings, shape: ModelShape, card: Card, gpus: int) -> tuple[str, ...]:
    """The gentlest changes that make a run fit; each candidate is planned before it is named."""

    def fits(changes: list[str]) -> bool:
        try:
            return not any(_problems(settings.override(changes), shape, card, gpus))
        except SettingsError:
            return False

    changes: list[str] = []
    for change in _candidates(settings, shape, card, gpus):
        key = change.partition("=")[0]
        changes = [other for other in changes if other.partition("=")[0] != key] + [change]
        if fits(changes):
            needed = list(changes)
            for one in reversed(changes):  # those that change the run most go first, where they are not needed
                fewer = [other for other in needed if other != one]
                if fits(fewer):
                    needed = fewer
            return tuple(needed)
    return ()


def _candidates(settings: RunSettings, shape: ModelShape, card: Card, gpus: int) -> Iterator[str]:
    """Changes from those that cost nothing to those that change the run, each on top of the ones before."""
    training, sampler = settings.training_settings(1), settings.sampler
    if settings.dtype == "bfloat16" and not card.bfloat16:
        yield "dtype=float16"
    if gpus == 1 and settings.shard:
        yield "shard=false"
    if settings.max_prompt_tokens + training.max_new_tokens > shape.positions:
        yield f"training.max_new_tokens={max(1, shape.positions - settings.max_prompt_tokens)}"
    if not settings.gradient_checkpointing:
        yield "gradient_checkpointing=true"
    rows = training.micro_batch
    while rows > 1:
        rows //= 2
        yield f"training.micro_batch={rows}"
    if sampler.engine == "transformers" and settings.method == "grpo":
        for size in (256, 64, 16, 4, 1):
            if size < (sampler.batch_size or 10**9):
                yield f"sampler.batch_size={size}"
    if sampler.engine == "vllm":
        yield from (f"sampler.gpu_memory={share}" for share in (0.6, 0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2))
    if gpus > 1 and not settings.shard:
        yield "shard=true"
    if sampler.engine == "vllm":
        yield "sampler.engine=transformers"
        yield from (f"sampler.batch_size={size}" for size in (64, 16, 4))
    if settings.quantize is None and settings.adapter.kind != "all":
        yield "quantize=nf4"
    tokens = training.max_new_tokens
    while tokens > 512:
        tokens //= 2
        yield f"training.max_new_tokens={tokens}"
        if settings.adapter.calibrated:
            yield f"adapter.calibration.max_new_tokens={min(tokens, settings.adapter.calibration.max_new_tokens)}"


def _config(settings: RunSettings) -> PretrainedConfig:
    from tinylora_lite.planning.models import model_config

    try:
        return model_config(settings.model)
    except ValueError:
        from transformers import AutoConfig

        try:
            found: PretrainedConfig = AutoConfig.from_pretrained(settings.model, revision=settings.revision)
        except OSError as error:
            raise ValueError(
                f"no configuration of {settings.model}: it is no folder, no model known by name, and the hub did not "
                "give it"
            ) from error
        return found
