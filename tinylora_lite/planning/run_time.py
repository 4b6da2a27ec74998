"""How long a run takes, from what it computes and what a card can do at best.

A frozen base costs 2 FLOPs per weight and token forward and 2 backward, because no weight has a gradient; gradient
checkpointing adds 2. Decoding is bound by the memory's bandwidth: every step reads all weights, and the keys and values
of every sequence. No card reaches its data sheet's figures, and how near it comes is what the ranges below assume.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from tinylora_lite.experiment.settings import RunSettings
from tinylora_lite.planning.estimate import ELEMENT, vllm_cache, weight_bytes
from tinylora_lite.planning.gpus import Card
from tinylora_lite.planning.shapes import ModelShape
from tinylora_lite.tasks.catalog import PROBLEM_SETS
from tinylora_lite.training.settings import GRPOSettings

MATRIX_USE = (0.5, 0.2)
"""Which share of the matrix rate training reaches, at best and at worst. The worst is such that the one public run with
a wall time falls inside: Qwen2.5-7B on GSM8K, 3 epochs in 4 to 5 hours on an H200 (GuoKaku/TinyLora_Reproduce)."""
BANDWIDTH_USE = (0.8, 0.4)
"""Which share of the memory's bandwidth decoding reaches."""
LAYER_SECONDS = (0.5e-3, 1.5e-3)
"""What one layer costs in one decoding step of transformers at least, however small the batch: Python, and kernels that
are started one by one."""
TAIL = (2.0, 6.0)
"""The longest completion of a batch, in mean lengths."""
LINE_SEARCH = 7
"""How often calibration samples a batch of problems to find its stride (up to 13 times)."""

LENGTHS = {"gsm8k": 300.0, "math": 700.0, "nano": 25.0}
"""Mean tokens of a completion. MATH: figure 5 of the paper has 640 to 800. The others are assumptions."""
PROMPT_SHARE = 150
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
        tokens: of prompts and completions that one step trains on, in all processes.
        flops: of the training half of one step, in all processes.
        sampling, training: seconds of one step.
        evaluating: seconds of scoring the base and the trained model.
        calibrating: seconds of making a basis.
    """

    steps: int
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
    settings: RunSettings,
    shape: ModelShape,
    card: Card,
    *,
    processes: int = 1,
    length: float | None = None,
    problems: int | None = None,
) -> RunTime:
    """Estimates a run.

    Args:
        settings: of the run.
        shape: of its model.
        card: of every process.
        processes: cards that train.
        length: mean tokens of a completion; ``None`` takes :data:`LENGTHS`, or half the limit.
        problems: of the training split; ``None`` counts those of the task's problem set, or takes 8,000.
    """
    problems = problems or _problems_of(settings.task, "train")
    training = settings.training_settings(problems)
    limit = training.max_new_tokens
    length = min(length or LENGTHS.get(settings.task, limit / 2), limit)
    prompt = min(PROMPT_SHARE, settings.max_prompt_tokens)
    engine = _Engine(settings, shape, card, prompt, length)
    nothing = Range(0.0, 0.0)
    rows, sampling, reference, old = training.prompts_per_step, nothing, 0, 0
    if isinstance(training, GRPOSettings):
        rows *= training.group_size
        sampling = engine.seconds(math.ceil(rows / processes), limit)
        reference, old = int(training.kl > 0), training.epochs_per_step if training.epochs_per_step > 1 else 0
    tokens = rows * (prompt + length)
    flops = tokens * (engine.flops_per_token() * max(1, old) + engine.forward() * (reference + bool(old)))
    adapter, calibrating = settings.adapter, nothing
    if adapter.calibrated and adapter.projection == "calibrated":
        c = adapter.calibration
        completions = c.problems * c.group_size
        searched = LINE_SEARCH * 32 * c.group_size if c.looks == 2 else 0
        gradients = engine.computing(completions * (prompt + length) * engine.flops_per_token())
        calibrating = engine.seconds(completions + searched, c.max_new_tokens) + gradients
    tests = sum(_scored_problems(settings, task) for task in settings.evaluation.tasks)
    scored = math.ceil(2 * tests * settings.evaluation.samples / processes)
    return RunTime(
        steps=training.steps,
        tokens=tokens,
        flops=flops,
        sampling=sampling,
        training=engine.computing(flops / processes),
        evaluating=engine.seconds(scored, settings.evaluation.max_new_tokens) if scored else nothing,
        calibrating=calibrating,
    )


def _problems_of(task: str, split: Literal["train", "test"]) -> int:
    if task not in PROBLEM_SETS:  # the nano world, or a task of somebody's own
        return 8000 if split == "train" else 1000
    found = PROBLEM_SETS[task]
    return found.rows.get(split, 0) - (found.validation if split == "train" else 0)


def _scored_problems(settings: RunSettings, task: str) -> int:
    there = _problems_of(task, "test")
    return min(settings.evaluation.problems or there, there)


@dataclass(frozen=True)
class _Engine:
    """What one card computes of a model, at sequences of a mean length."""

    settings: RunSettings
    shape: ModelShape
    card: Card
    prompt: float
    length: float

    def forward(self) -> float:
        """FLOPs of one token, attention to half of its sequence included."""
        return 2 * self.shape.multiplied + self._attention()

    def flops_per_token(self) -> float:
        """FLOPs of one token, forward and backward."""
        blocks, head = 2 * self.shape.linear + self._attention(), 2 * self.shape.head
        backward = 2 if self.settings.adapter.kind == "all" else 1
        # The head's logits are made twice, chunk by chunk.
        return blocks * (1 + backward + self.settings.gradient_checkpointing) + head * (2 + backward)

    def _attention(self) -> float:
        return 4 * self.shape.layers * self.shape.attention * (self.prompt + self.length) / 2

    def computing(self, flops: float) -> Range:
        """Seconds of matrix products."""
        best, worst = MATRIX_USE
        # In float32 these cards multiply at half of their rate for half precision, at best.
        rate = self.card.matrix_rate / (2 if self.settings.dtype == "float32" else 1)
        return Range(flops / rate / best, flops / rate / worst)

    def seconds(self, completions: int, limit: int) -> Range:
        """Seconds of sampling: prompts read, then steps of decoding, each bound by one of the card's limits."""
        best = self._decoding(completions, limit, 0)
        return Range(best, self._decoding(completions, limit, 1)) + self.computing(
            completions * self.prompt * self.forward()
        )

    def _decoding(self, completions: int, limit: int, case: int) -> float:
        sampler, length = self.settings.sampler, min(self.length, limit)
        longest = min(limit, TAIL[case] * length)
        if sampler.engine == "transformers":
            together = min(completions, sampler.batch_size or completions)
            steps = math.ceil(completions / together) * longest
            least = LAYER_SECONDS[case] * self.shape.layers
        else:
            room = vllm_cache(self.settings, self.shape, self.card.memory) / (self.prompt + length)
            together = max(1, min(completions, int(room)))
            steps, least = max(completions * length / together, longest), 0.0
        element = ELEMENT[self.settings.dtype]
        quantized = sampler.engine == "transformers"
        weights = weight_bytes(self.settings, self.shape) if quantized else self.shape.parameters * element
        cache = together * (self.prompt + length / 2) * self.shape.cache_per_token(element)
        reading = (weights + cache) / (self.card.bandwidth * BANDWIDTH_USE[case] * sampler.tensor_parallel)
        multiplying = together * self.forward() / (self.card.matrix_rate * MATRIX_USE[case] * sampler.tensor_parallel)
        return steps * max(reading, multiplying, least)
