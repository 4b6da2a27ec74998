"""How long a run takes, from what it computes and what a GPU can do at best.

A frozen base costs 2 FLOPs per weight and token forward and 2 backward, because no weight has a gradient; gradient
checkpointing adds 2. Each decoding step reads all weights, and the keys and values of every sequence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from tinylora_lite.experiment.settings import RunSettings
from tinylora_lite.planning.gpus import GPU
from tinylora_lite.planning.memory import ELEMENT, vllm_cache, weight_bytes
from tinylora_lite.planning.shapes import ModelShape
from tinylora_lite.tasks.catalog import PROBLEM_SETS
from tinylora_lite.training.settings import GRPOSettings

MATRIX_USE = (0.5, 0.2)
"""The share of the matrix rate that training reaches, at best and at worst. The worst is such that the one public run
with a wall time falls inside: Qwen2.5-7B on GSM8K, 3 epochs in 4 to 5 hours on an H200 (GuoKaku/TinyLora_Reproduce)."""
BANDWIDTH_USE = (0.8, 0.4)
"""The share of the memory's bandwidth that decoding reaches."""
LAYER_SECONDS = (0.5e-3, 1.5e-3)
"""What one layer costs in one decoding step of transformers at least: Python, and kernels started one by one."""
TAIL = (2.0, 6.0)
"""The longest completion of a batch, in mean lengths."""
LINE_SEARCH = 7 * 32
"""Problems that calibration samples to find its step size: a batch of 32, 7 times (up to 13)."""
LENGTHS = {"gsm8k": 300.0, "math": 700.0, "nano": 25.0}
"""Mean tokens of a completion. MATH: figure 5 of the paper has 640 to 800. The others are assumptions."""
PROMPT_LENGTH = 150
"""Mean tokens of a prompt, an assumption."""


@dataclass(frozen=True)
class Range:
    """From the best case to the worst."""

    low: float
    high: float

    def __add__(self, other: Range) -> Range:
        return Range(self.low + other.low, self.high + other.high)

    def __mul__(self, factor: float) -> Range:
        return Range(self.low * factor, self.high * factor)


@dataclass(frozen=True)
class RunTime:
    """Where the seconds of a run go.

    Attributes:
        steps: of training.
        length: mean tokens of a completion.
        tokens, flops: of one step, in all processes; tokens of prompts and completions, FLOPs of the training half.
        sampling, training: seconds of one step.
        evaluating: seconds of scoring the base and the trained model.
        calibrating: seconds of making a basis.
    """

    steps: int
    length: float
    tokens: float
    flops: float
    sampling: Range
    training: Range
    evaluating: Range
    calibrating: Range

    @property
    def hours(self) -> Range:
        """Of the whole run, set-up left out."""
        return ((self.sampling + self.training) * self.steps + self.evaluating + self.calibrating) * (1 / 3600)


def run_time(
    settings: RunSettings, shape: ModelShape, gpu: GPU, processes: int, length: float | None, problems: int | None
) -> RunTime:
    """Estimates the seconds of a run; the arguments are those of :func:`~tinylora_lite.planning.plan.plan_run`."""
    training = settings.training_settings(problems or _problems_of(settings.task, "train"))
    adapter, evaluation, nothing = settings.adapter, settings.evaluation, Range(0.0, 0.0)
    limit = training.max_new_tokens
    speed = _Speed(settings, shape, gpu, min(length or LENGTHS.get(settings.task, limit / 2), limit))
    each = speed.prompt + speed.length
    rows, flops, sampling, calibrating = training.prompts_per_step, speed.step, nothing, nothing
    if isinstance(training, GRPOSettings):
        rows *= training.group_size
        sampling = speed.sampling(math.ceil(rows / processes), limit)
        several = (
            training.epochs_per_step * training.mini_batches > 1
        )  # then the old log-probabilities are computed first
        flops = speed.step * training.epochs_per_step + speed.forward * ((training.kl > 0) + several)
    if adapter.calibrated and adapter.projection == "calibrated":
        c = adapter.calibration
        searched = LINE_SEARCH if c.looks == 2 else 0
        calibrating = speed.sampling((c.problems + searched) * c.group_size, c.max_new_tokens)
        calibrating += speed.computing(c.problems * c.group_size * each * speed.step)
    tests = [_problems_of(task, "test") for task in evaluation.tasks]
    scored = 2 * sum(min(evaluation.problems or there, there) for there in tests) * evaluation.samples
    return RunTime(
        steps=training.steps,
        length=speed.length,
        tokens=rows * each,
        flops=rows * each * flops,
        sampling=sampling,
        training=speed.computing(rows * each * flops / processes),
        evaluating=speed.sampling(math.ceil(scored / processes), evaluation.max_new_tokens) if scored else nothing,
        calibrating=calibrating,
    )


def assumptions(settings: RunSettings, gpu: GPU, length: float) -> list[str]:
    """What the time supposes, in words."""
    said = [
        f"completions of {length:,.0f} tokens and prompts of {PROMPT_LENGTH} on average",
        f"training at {MATRIX_USE[1]:.0%} to {MATRIX_USE[0]:.0%} of {gpu.matrix_rate / 1e12:,.0f} TFLOPS",
        f"decoding at {BANDWIDTH_USE[1]:.0%} to {BANDWIDTH_USE[0]:.0%} of {gpu.bandwidth / 1e9:,.0f} GB/s",
        f"the longest completion of a batch {TAIL[0]:.0f} to {TAIL[1]:.0f} times the mean",
    ]
    if settings.sampler.engine == "transformers":
        low, high = (1000 * seconds for seconds in LAYER_SECONDS)
        said.append(f"{low:g} to {high:g} ms for a layer in a decoding step of transformers, however few the rows")
    return [*said, "every group of answers counts; loading and the SVD are left out"]


def _problems_of(task: str, split: Literal["train", "test"]) -> int:
    if task not in PROBLEM_SETS:  # the nano world, or a task of somebody's own
        return 8000 if split == "train" else 1000
    found = PROBLEM_SETS[task]
    return found.rows.get(split, 0) - (found.validation if split == "train" else 0)


class _Speed:
    """What one GPU computes of a model, at sequences of a mean length."""

    def __init__(self, settings: RunSettings, shape: ModelShape, gpu: GPU, length: float) -> None:
        self.settings, self.shape, self.gpu, self.length = settings, shape, gpu, length
        self.prompt = min(PROMPT_LENGTH, settings.max_prompt_tokens)
        # FLOPs of one token, attention to half of its sequence included. Logits of a head that trains are made twice.
        attention = 4 * shape.layers * shape.attention * (self.prompt + length) / 2
        blocks, head = 2 * shape.linear + attention, 2 * shape.head
        backward = 2 if settings.adapter.kind == "all" else 1
        self.forward = blocks + head
        self.step = blocks * (1 + backward + settings.gradient_checkpointing) + head * (2 * backward)

    def computing(self, flops: float) -> Range:
        """Seconds of matrix products; float32 has half of the rate of half precision, at best."""
        rate = self.gpu.matrix_rate / (2 if self.settings.dtype == "float32" else 1)
        return Range(*(flops / rate / use for use in MATRIX_USE))

    def sampling(self, completions: int, limit: int) -> Range:
        """Seconds of reading prompts and of decoding, each step of which is bound by one of the GPU's limits."""
        decoding = Range(*(self._decoding(completions, limit, case) for case in (0, 1)))
        return decoding + self.computing(completions * self.prompt * self.forward)

    def _decoding(self, completions: int, limit: int, case: int) -> float:
        sampler, shape, length = self.settings.sampler, self.shape, min(self.length, limit)
        element, longest = ELEMENT[self.settings.dtype], min(limit, TAIL[case] * length)
        if sampler.engine == "transformers":
            weights = weight_bytes(self.settings, shape)
            together = min(completions, sampler.batch_size or completions)
            steps, least = math.ceil(completions / together) * longest, LAYER_SECONDS[case] * shape.layers
        else:
            weights = shape.parameters * element
            room = vllm_cache(self.settings, shape, self.gpu.memory) / (self.prompt + length)
            together = max(1, min(completions, int(room)))
            steps, least = max(completions * length / together, longest), 0.0
        cache = together * (self.prompt + length / 2) * shape.cache_per_token(element)
        reading = (weights + cache) / (self.gpu.bandwidth * BANDWIDTH_USE[case] * sampler.tensor_parallel)
        multiplying = together * self.forward / (self.gpu.matrix_rate * MATRIX_USE[case] * sampler.tensor_parallel)
        return steps * max(reading, multiplying, least)
