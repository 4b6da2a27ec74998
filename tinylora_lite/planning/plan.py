"""What a run will take, before it is paid for: memory, time, whether it fits, and what to change where it does not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tinylora_lite.experiment.presets import gpu_name
from tinylora_lite.experiment.settings import RunSettings
from tinylora_lite.experiment.settings_file import SettingsError
from tinylora_lite.planning.gpus import GPU, GPUS, this_cpu
from tinylora_lite.planning.memory import Phase, Term, memory_terms, trained_parameters, vllm_cache, weight_bytes
from tinylora_lite.planning.run_time import RunTime, run_time
from tinylora_lite.planning.shapes import ModelShape, model_config
from tinylora_lite.sampling.policy import LOGITS_AT_ONCE, ON_A_CPU

if TYPE_CHECKING:
    from transformers import PretrainedConfig

LIBRARIES = 0.6 * 2**30
"""Bytes that a process has in memory before it loads a model."""
POWERS_OF_TWO = [2**power for power in range(15, -1, -1)]


@dataclass(frozen=True)
class Plan:
    """What a run takes; the arguments are those of :func:`plan_run`."""

    settings: RunSettings
    shape: ModelShape
    gpu: GPU
    gpus: int = 1
    length: float | None = None
    training_problems: int | None = None
    price: float | None = None

    @property
    def parameters(self) -> int:
        """How many train."""
        return trained_parameters(self.settings, self.shape)

    @cached_property
    def terms(self) -> list[Term]:
        """What takes memory on each GPU, and when."""
        gpu = self.gpu.matrix_rate > 0
        libraries = [] if gpu else [Term("Python, PyTorch and transformers", LIBRARIES, "always")]
        at_once = LOGITS_AT_ONCE if gpu else min(LOGITS_AT_ONCE, ON_A_CPU)
        return libraries + memory_terms(self.settings, self.shape, self.gpu.memory, self.gpus, at_once)

    @property
    def peaks(self) -> dict[Phase, float]:
        """Bytes on each GPU in each phase, what is always there included; the largest of them has to fit."""
        always = sum(term.bytes for term in self.terms if term.phase == "always")
        phases: dict[Phase, float] = {}
        for term in self.terms:
            if term.phase != "always":
                phases[term.phase] = phases.get(term.phase, always) + term.bytes
        return phases

    @property
    def fits(self) -> bool:
        """Whether it runs on this GPU."""
        return not self.problems

    @cached_property
    def problems(self) -> list[str]:
        """Why the run does not fit, one sentence each; empty where it fits."""
        return list(self._problems())

    @cached_property
    def time(self) -> RunTime:
        """Where the seconds go, on a GPU."""
        return run_time(self.settings, self.shape, self.gpu, self.gpus, self.length, self.training_problems)

    @property
    def cost(self) -> tuple[float, float] | None:
        """What one run costs, in the price's money."""
        if self.price is None or not self.gpu.matrix_rate:
            return None
        return astuple(self.time.hours * (self.gpus * self.price))

    @cached_property
    def advice(self) -> list[str]:
        """The gentlest changes that make the run fit, each ``key=value``, planned together.

        Empty where it fits already, or where none was found.
        """

        def fits(changes: dict[str, Any]) -> bool:
            try:
                return replace(self, settings=self.settings.override(_words(changes))).fits
            except SettingsError:
                return False

        changes: dict[str, Any] = {}
        for key, value in () if self.fits else self._candidates():
            changes.pop(key, None)
            changes[key] = value
            if fits(changes):
                # Those that change the run most go first, where they are not needed.
                for one in reversed(list(changes)):
                    fewer = {other: changes[other] for other in changes if other != one}
                    changes = fewer if fits(fewer) else changes
                return _words(changes)
        return []

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        same = ("gpus", "parameters", "peaks", "fits", "problems", "advice", "cost")
        time = self.time if self.gpu.matrix_rate else None
        return {name: getattr(self, name) for name in same} | {
            "length": time and time.length,
            "model": self.settings.model,
            "gpu": asdict(self.gpu),
            "memory": [term._asdict() for term in self.terms],
            "capacity": self.gpu.usable,
            "time": time and asdict(time),
            "hours": time and asdict(time.hours),
            "runs": len(self.settings.sweep()),
        }

    def _problems(self) -> Iterator[str]:
        settings, shape, gpu, sampler = self.settings, self.shape, self.gpu, self.settings.sampler
        for phase, needed in self.peaks.items():
            if needed > gpu.usable:
                has = f"{gpu.usable / 2**30:.1f} GiB that a {gpu.name} has for it"
                yield f"{phase} takes {needed / 2**30:.1f} GiB of the {has}"
        asked, limit = settings.max_prompt_tokens, settings.training_settings(1).max_new_tokens
        positions = shape.config.max_position_embeddings
        if asked + limit > positions:
            both = f"max_prompt_tokens={asked} and max_new_tokens={limit} together"
            yield f"the model has {positions:,} positions, fewer than {both}"
        if self.gpus > 1 and sampler.engine == "vllm":
            yield "an engine lives in one process; several share a server: set sampler.engine=vllm-server"
        if settings.shard and weight_bytes(settings, shape) > gpu.usable:
            yield "each process loads the whole base before it is spread, and the GPU does not hold it"
        if settings.dtype == "bfloat16" and not gpu.bfloat16:
            yield f"a {gpu.name} does not multiply bfloat16; set dtype=float16"
        if settings.method == "grpo" and sampler.engine != "transformers":
            room = vllm_cache(settings, shape, gpu.memory)
            if room < asked + limit:
                share, cached = f"{sampler.gpu_memory:.0%} of the GPU", f"the cache of {max(0, int(room)):,} tokens"
                yield f"vLLM's {share} hold its weights and {cached}, fewer than one longest sequence"
        if settings.shard and self.gpus == 1:
            yield "shard spreads the weights over several GPUs, and there is one"

    def _candidates(self) -> Iterator[tuple[str, Any]]:
        """Changes from those that cost nothing to those that change the run, each on top of the ones before."""
        settings, sampler, positions = self.settings, self.settings.sampler, self.shape.config.max_position_embeddings
        training = settings.training_settings(1)
        if settings.dtype == "bfloat16" and not self.gpu.bfloat16:
            yield "dtype", "float16"
        if self.gpus == 1 and settings.shard:
            yield "shard", "false"
        if settings.max_prompt_tokens + training.max_new_tokens > positions:
            yield "training.max_new_tokens", max(1, positions - settings.max_prompt_tokens)
        if not settings.gradient_checkpointing:
            yield "gradient_checkpointing", "true"
        for rows in POWERS_OF_TWO:
            if rows < training.micro_batch:
                yield "training.micro_batch", rows
        if sampler.engine == "transformers" and settings.method == "grpo":
            for rows in (256, 64, 16, 4, 1):
                if sampler.batch_size is None or rows < sampler.batch_size:
                    yield "sampler.batch_size", rows
        if sampler.engine == "vllm":
            for share in (0.6, 0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2):
                yield "sampler.gpu_memory", share
        if self.gpus > 1 and not settings.shard:
            yield "shard", "true"
        if sampler.engine == "vllm":
            yield "sampler.engine", "transformers"
            for rows in (64, 16, 4):
                yield "sampler.batch_size", rows
        if settings.quantize is None and settings.adapter.kind != "all":
            yield "quantize", "nf4"
        for tokens in POWERS_OF_TWO:
            if 512 <= tokens < training.max_new_tokens:
                yield "training.max_new_tokens", tokens
                if settings.adapter.calibrated:
                    own = settings.adapter.calibration.max_new_tokens
                    yield "adapter.calibration.max_new_tokens", min(tokens, own)


def plan_run(
    settings: RunSettings,
    gpu: str = "a100-80gb",
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
        gpu: a name of :data:`~tinylora_lite.planning.gpus.GPUS`, or ``a100``, ``h100-80gb``, ``rtx4090``; or ``cpu``,
            this machine's, of which no time is planned.
        gpus: how many train, one process each.
        config: of the model; ``None`` takes :func:`~tinylora_lite.planning.shapes.model_config`'s.
        length: mean tokens of a completion; ``None`` takes those of ``run_time.LENGTHS``, or half of the limit.
        problems: of the training split; ``None`` takes those of the task's problem set, or 8,000.
        price: of one GPU for one hour, in whatever money.

    Raises:
        ValueError: an unknown GPU or model, or ``gpus`` cannot share a step's prompts.
    """
    if (gpu := gpu_name(gpu)) not in GPUS and gpu != "cpu":
        raise ValueError(f"no GPU named {gpu}; there are: {', '.join(GPUS)}, and cpu")
    prompts = settings.training_settings(1).prompts_per_step
    if gpus < 1 or prompts % gpus:
        raise ValueError(f"prompts_per_step={prompts} cannot be shared by {gpus} GPUs")
    shape = ModelShape.of(config or model_config(settings.model, settings.revision))
    planned = this_cpu() if gpu == "cpu" else GPUS[gpu]
    settings = settings.with_dtype("float32" if gpu == "cpu" else "bfloat16")
    return Plan(settings, shape, planned, gpus, length, problems, price)


def gpus_that_fit(plan: Plan) -> list[str]:
    """The names of the GPUs that a run fits on as it is."""
    return [name for name, gpu in GPUS.items() if replace(plan, gpu=gpu).fits]


def _words(changes: dict[str, Any]) -> list[str]:
    return [f"{key}={value}" for key, value in changes.items()]
