"""What a run will take, before it is paid for: memory, time, whether it fits, and what to change where it does not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tinylora_lite.experiment.settings import RunSettings
from tinylora_lite.experiment.settings_file import SettingsError
from tinylora_lite.planning import run_time as t
from tinylora_lite.planning.gpus import GPU, GPUS, gpu_named
from tinylora_lite.planning.memory import Phase, Term, memory_terms, peak, trained_parameters, vllm_cache, weight_bytes
from tinylora_lite.planning.shapes import ModelShape, model_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Plan:
    """What a run takes.

    Attributes:
        settings: of the run.
        gpu: what it runs on.
        gpus: how many of them train, one process each.
        parameters: how many train.
        terms: what takes memory on each GPU, and when.
        problems: why the run does not fit, one sentence each; empty where it fits.
        advice: settings that make it fit, each ``key=value``, checked together; empty where it fits already, or where
            none was found.
        time: where the seconds go.
        length: the mean tokens of a completion that the time supposes.
        price: of one GPU for one hour, in whatever money; ``None`` where nobody gave one.
    """

    settings: RunSettings
    gpu: GPU
    gpus: int
    parameters: int
    terms: tuple[Term, ...]
    problems: tuple[str, ...]
    advice: tuple[str, ...]
    time: t.RunTime
    length: float
    price: float | None

    @property
    def peaks(self) -> dict[Phase, float]:
        """Bytes on each GPU in each phase, what is always there included."""
        return peak(list(self.terms))

    @property
    def fits(self) -> bool:
        """Whether it runs on this GPU."""
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
        same = ("gpus", "parameters", "peaks", "fits", "problems", "advice", "length", "cost")
        return {name: getattr(self, name) for name in same} | {
            "model": self.settings.model,
            "gpu": asdict(self.gpu),
            "memory": [asdict(term) for term in self.terms],
            "capacity": self.gpu.usable,
            "time": asdict(self.time),
            "hours": asdict(self.time.hours),
            "runs": len(self.settings.sweep()),
        }


def plan_run(
    settings: RunSettings,
    gpu: str | GPU = "a100-80gb",
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
        gpu: a name of :data:`~tinylora_lite.planning.gpus.GPUS`, or a GPU.
        gpus: how many train.
        config: of the model; ``None`` knows some models by name, reads a folder, and asks the hub for others.
        length: mean tokens of a completion; see :func:`~tinylora_lite.planning.run_time.run_time`.
        problems: of the training split.
        price: of one GPU for one hour.

    Raises:
        ValueError: an unknown GPU or model, or ``gpus`` cannot share a step's prompts.
    """
    gpu = gpu_named(gpu) if isinstance(gpu, str) else gpu
    prompts = settings.training_settings(1).prompts_per_step
    if gpus < 1 or prompts % gpus:
        raise ValueError(f"prompts_per_step={prompts} cannot be shared by {gpus} GPUs")
    shape = ModelShape.of(config or _config(settings))
    found = tuple(_problems(settings, shape, gpu, gpus))
    return Plan(
        settings=settings,
        gpu=gpu,
        gpus=gpus,
        parameters=trained_parameters(settings, shape),
        terms=tuple(memory_terms(settings, shape, gpu.memory, gpus)),
        problems=found,
        advice=_advice(settings, shape, gpu, gpus) if found else (),
        time=t.run_time(settings, shape, gpu, processes=gpus, length=length, problems=problems),
        length=t.mean_length(settings, length),
        price=price,
    )


def gpus_that_fit(settings: RunSettings, config: PretrainedConfig | None = None, gpus: int = 1) -> list[str]:
    """The names of the GPUs that a run fits on as it is."""
    shape = ModelShape.of(config or _config(settings))
    return [name for name, gpu in GPUS.items() if not any(_problems(settings, shape, gpu, gpus))]


def assumptions(plan: Plan) -> list[str]:
    """What the time supposes, in words."""
    said = [
        f"completions of {plan.length:,.0f} tokens and prompts of {t.PROMPT_LENGTH} on average",
        f"training at {t.MATRIX_USE[1]:.0%} to {t.MATRIX_USE[0]:.0%} of {plan.gpu.matrix_rate / 1e12:,.0f} TFLOPS",
        f"decoding at {t.BANDWIDTH_USE[1]:.0%} to {t.BANDWIDTH_USE[0]:.0%} of {plan.gpu.bandwidth / 1e9:,.0f} GB/s",
        f"the longest completion of a batch {t.TAIL[0]:.0f} to {t.TAIL[1]:.0f} times the mean",
    ]
    if plan.settings.sampler.engine == "transformers":
        low, high = (1000 * seconds for seconds in t.LAYER_SECONDS)
        said.append(f"{low:g} to {high:g} ms for a layer in a decoding step of transformers, however few the rows")
    return [*said, "every group of answers counts; loading and the SVD are left out"]


def _problems(settings: RunSettings, shape: ModelShape, gpu: GPU, gpus: int) -> Iterator[str]:
    terms, sampler = memory_terms(settings, shape, gpu.memory, gpus), settings.sampler
    for phase, needed in peak(terms).items():
        if needed > gpu.usable:
            has = f"{gpu.usable / 2**30:.1f} GiB that a {gpu.name} has for it"
            yield f"{phase} takes {needed / 2**30:.1f} GiB of the {has}"
    limit = settings.training_settings(1).max_new_tokens
    longest = settings.max_prompt_tokens + limit
    if longest > shape.positions:
        yield (
            f"the model has {shape.positions:,} positions, fewer than max_prompt_tokens={settings.max_prompt_tokens} "
            f"and max_new_tokens={limit} together"
        )
    if gpus > 1 and sampler.engine == "vllm":
        yield "an engine lives in one process; several share a server: set sampler.engine=vllm-server"
    if settings.shard and weight_bytes(settings, shape) > gpu.usable:
        yield "each process loads the whole base before it is spread, and the GPU does not hold it"
    if settings.dtype == "bfloat16" and not gpu.bfloat16:
        yield f"a {gpu.name} does not multiply bfloat16; set dtype=float16"
    if settings.method == "grpo" and sampler.engine != "transformers":
        room = vllm_cache(settings, shape, gpu.memory)
        if room < longest:
            yield (
                f"vLLM's {sampler.gpu_memory:.0%} of the GPU hold its weights and the cache of "
                f"{max(0, int(room)):,} tokens, fewer than one longest sequence"
            )
    if settings.shard and gpus == 1:
        yield "shard spreads the weights over several GPUs, and there is one"


def _advice(settings: RunSettings, shape: ModelShape, gpu: GPU, gpus: int) -> tuple[str, ...]:
    """The gentlest changes that make a run fit; each candidate is planned before it is named."""

    def fits(changes: list[str]) -> bool:
        try:
            return not any(_problems(settings.override(changes), shape, gpu, gpus))
        except SettingsError:
            return False

    changes: list[str] = []
    for change in _candidates(settings, shape, gpu, gpus):
        key = change.partition("=")[0]
        changes = [other for other in changes if other.partition("=")[0] != key] + [change]
        if fits(changes):
            for one in reversed(changes):  # those that change the run most go first, where they are not needed
                fewer = [other for other in changes if other != one]
                if fits(fewer):
                    changes = fewer
            return tuple(changes)
    return ()


def _candidates(settings: RunSettings, shape: ModelShape, gpu: GPU, gpus: int) -> Iterator[str]:
    """Changes from those that cost nothing to those that change the run, each on top of the ones before."""
    training, sampler = settings.training_settings(1), settings.sampler
    if settings.dtype == "bfloat16" and not gpu.bfloat16:
        yield "dtype=float16"
    if gpus == 1 and settings.shard:
        yield "shard=false"
    if settings.max_prompt_tokens + training.max_new_tokens > shape.positions:
        yield f"training.max_new_tokens={max(1, shape.positions - settings.max_prompt_tokens)}"
    if not settings.gradient_checkpointing:
        yield "gradient_checkpointing=true"
    yield from (f"training.micro_batch={rows}" for rows in _halves(training.micro_batch, 1))
    if sampler.engine == "transformers" and settings.method == "grpo":
        rows = sampler.batch_size or 10**9
        yield from (f"sampler.batch_size={size}" for size in (256, 64, 16, 4, 1) if size < rows)
    if sampler.engine == "vllm":
        yield from (f"sampler.gpu_memory={share}" for share in (0.6, 0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2))
    if gpus > 1 and not settings.shard:
        yield "shard=true"
    if sampler.engine == "vllm":
        yield "sampler.engine=transformers"
        yield from (f"sampler.batch_size={size}" for size in (64, 16, 4))
    if settings.quantize is None and settings.adapter.kind != "all":
        yield "quantize=nf4"
    for tokens in _halves(training.max_new_tokens, 512):
        yield f"training.max_new_tokens={tokens}"
        if settings.adapter.calibrated:
            yield f"adapter.calibration.max_new_tokens={min(tokens, settings.adapter.calibration.max_new_tokens)}"


def _halves(number: int, least: int) -> Iterator[int]:
    """A half, a quarter and so on, until ``least`` is reached."""
    while number > least:
        number //= 2
        yield number


def _config(settings: RunSettings) -> PretrainedConfig:
    try:
        return model_config(settings.model)
    except ValueError:
        from transformers import AutoConfig
    try:
        found: PretrainedConfig = AutoConfig.from_pretrained(settings.model, revision=settings.revision)
    except OSError as error:
        wrong = "it is no folder, no model known by name, and the hub did not give it"
        raise ValueError(f"no configuration of {settings.model}: {wrong}") from error
    return found
