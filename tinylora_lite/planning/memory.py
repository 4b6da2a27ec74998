"""What a run takes of a GPU's memory, from shapes alone.

The formulas count tensors; those of activations count what PyTorch keeps for the backward pass of a block of Qwen2 or
Llama under ``scaled_dot_product_attention``. The inputs of frozen linear layers are not kept, which is why a frozen
model trains in less. ``benchmarks/memory_checks.py`` holds the formulas against real tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from tinylora_lite.adapter.tying import groups_of
from tinylora_lite.experiment.settings import RunSettings
from tinylora_lite.planning.shapes import ModelShape
from tinylora_lite.sampling.policy import LOGITS_AT_ONCE
from tinylora_lite.training.calibrate import MICRO_BATCH
from tinylora_lite.training.settings import GRPOSettings

Phase = Literal["always", "set-up", "evaluating", "sampling", "calibrating", "training"]

FLOAT = 4
"""Bytes of a float32."""
ELEMENT = {"bfloat16": 2, "float16": 2, "float32": 4}
QUANTIZED = {"nf4": 0.5 + FLOAT / 64, "int8": 1.0}
"""Bytes of a weight: nf4 has one float32 scale for 64 weights."""
VLLM_WORKSPACE = 2 * 2**30
"""Bytes that vLLM is left for its activations and graphs, beside weights and cache."""


class Term(NamedTuple):
    """So many bytes on each GPU, always or only in one phase of a run."""

    name: str
    bytes: float
    phase: Phase


@dataclass(frozen=True)
class Batch:
    """Sequences that a model computes together, all as long as the limits allow.

    ``prompts`` of them differ and are read once, before the completions; 0 where each row is read with its prompt.
    """

    rows: int
    prompt: int
    completion: int
    prompts: int = 0

    @property
    def length(self) -> int:
        """Positions of a row; the last token of a completion is predicted and never read."""
        return self.prompt + self.completion - 1

    @property
    def tokens(self) -> int:
        """Positions that are computed."""
        read = self.prompts * self.prompt
        return read + self.rows * (self.completion - 1) if self.prompts else self.rows * self.length

    @property
    def attended(self) -> int:
        """Positions whose keys and values attention reads: those of prompts by themselves, and of all rows."""
        return self.prompts * self.prompt + self.rows * self.length

    @property
    def pairs(self) -> int:
        """Positions that are computed, times those that they may read."""
        read = self.prompts * self.prompt**2
        return read + self.rows * (self.completion - 1) * self.length if self.prompts else self.rows * self.length**2


def memory_terms(
    settings: RunSettings, shape: ModelShape, gpu_memory: float, processes: int = 1, at_once: int = LOGITS_AT_ONCE
) -> list[Term]:
    """What a run takes on each of the GPUs that train, one process each, at the limits of its lengths.

    ``gpu_memory`` is the bytes of a GPU, of which vLLM takes a share; ``at_once`` is how many logits exist at a time.
    """
    settings = settings.with_dtype("bfloat16")
    training, adapter, sampler = settings.training_settings(problems=1), settings.adapter, settings.sampler
    element, everything = ELEMENT[settings.dtype], adapter.kind == "all"
    parameters, sharded = trained_parameters(settings, shape), processes if settings.shard else 1
    terms = [Term("base weights", weight_bytes(settings, shape) / sharded, "always")]
    if everything:
        moments = 3 * element * parameters / sharded
        terms.append(Term("gradients of all weights, and Adam's two moments", moments, "always"))
        if settings.training.get("kl"):
            terms.append(Term("the untouched base, for the KL penalty", element * parameters, "always"))
    else:
        u = adapter.rank**2 if adapter.kind == "lora_xs" else adapter.u
        frozen = FLOAT * (adapter.rank * shape.sides + len(shape.targets) * u * adapter.rank**2)
        terms += [
            Term("factors UΣ and Vᵀ, and P", frozen, "always"),
            Term("v, its gradient and Adam's two moments", 4 * FLOAT * parameters, "always"),
            Term("SVD of the largest weight", 3 * FLOAT * shape.largest, "set-up"),
        ]
    rows = training.prompts_per_step
    if isinstance(training, GRPOSettings):
        rows *= training.group_size
        if sampler.engine == "vllm":
            terms.append(Term("vLLM: its weights, cache and LoRA", sampler.gpu_memory * gpu_memory, "always"))
    here = math.ceil(rows / processes)
    if isinstance(training, GRPOSettings) and sampler.engine == "transformers":
        together = min(sampler.batch_size or here, here)
        batch = Batch(together, settings.max_prompt_tokens, training.max_new_tokens)
        terms += sampling_terms(shape, batch, math.ceil(together / training.group_size), element)
    e = settings.evaluation
    if e.tasks and sampler.engine == "transformers":
        together = min(sampler.evaluated, (e.problems or sampler.evaluated) * e.samples)
        batch = Batch(together, settings.max_prompt_tokens, e.max_new_tokens)
        terms += sampling_terms(shape, batch, math.ceil(together / e.samples), element, "evaluating")
    shared = not (settings.gradient_checkpointing or settings.shard)  # as sampling.policy.can_share_prompts
    if adapter.calibrated and adapter.projection == "calibrated":
        c = adapter.calibration
        batch = Batch(min(MICRO_BATCH, c.group_size), settings.max_prompt_tokens, c.max_new_tokens, int(shared))
        terms += training_terms(settings, shape, batch, "calibrating", adapter.rank, at_once)
    together = min(training.micro_batch, here)
    prompts = shared * math.ceil(together / (training.group_size if isinstance(training, GRPOSettings) else 1))
    batch = Batch(together, settings.max_prompt_tokens, training.max_new_tokens, prompts)
    terms += training_terms(settings, shape, batch, "training", 0 if everything else adapter.rank, at_once)
    if settings.shard:
        two_blocks = 2 * (shape.linear // shape.layers) * element
        terms.append(Term("two blocks gathered from all GPUs", two_blocks, "training"))
    return terms


def weight_bytes(settings: RunSettings, shape: ModelShape) -> float:
    """Bytes of the base's weights; quantization shrinks the linear layers of the blocks alone."""
    element = ELEMENT[settings.dtype]
    linear = element if settings.quantize is None else QUANTIZED[settings.quantize]
    return (shape.parameters - shape.linear) * element + shape.linear * linear


def vllm_cache(settings: RunSettings, shape: ModelShape, gpu_memory: float) -> float:
    """Tokens whose keys and values vLLM has room for, in all of the GPUs that it spans; negative where none fit.

    Its own weights are not quantized; a LoRA takes a slot of rank 8 at least.
    """
    element, sampler = ELEMENT[settings.dtype], settings.sampler
    lora = max(8, settings.adapter.rank) * shape.sides * element if sampler.sync == "lora" else 0
    own = sampler.gpu_memory * gpu_memory - VLLM_WORKSPACE
    left = own * sampler.tensor_parallel - shape.parameters * element - lora
    return left / shape.cache_per_token(element)


def trained_parameters(settings: RunSettings, shape: ModelShape) -> int:
    """How many parameters train."""
    adapter = settings.adapter
    if adapter.kind == "all":
        return shape.parameters
    if adapter.kind == "lora_xs":
        return len(shape.targets) * adapter.rank**2
    return adapter.u * len(set(groups_of(shape.targets, adapter.n_tie, adapter.tying)))


def training_terms(
    settings: RunSettings, shape: ModelShape, batch: Batch, phase: Phase, rank: int, at_once: int = LOGITS_AT_ONCE
) -> list[Term]:
    """What forward and backward of one micro batch take."""
    element, width = ELEMENT[settings.dtype], shape.config.hidden_size
    block = saved_by_block(shape, batch, element, rank, settings.adapter.kind == "all")
    mask = batch.pairs
    last_norm = batch.tokens * FLOAT * (width + 1)
    casts = 0.0 if element == FLOAT else element * rank * shape.sides
    # Gradients that exist at once inside a block, at most: two of the MLP's width, a few of the block's.
    backward = batch.tokens * element * (2 * shape.config.intermediate_size + 3.5 * width)
    # Logits, their logarithms, and the gradient; those of few tokens wait for the backward pass. In chunks under a
    # frozen float32 head the gradient takes the place of the logarithms.
    predicted = batch.rows * batch.completion
    few = predicted * shape.config.vocab_size <= at_once
    copies = 3 if few or settings.adapter.kind == "all" or element != FLOAT else 2
    logits = copies * FLOAT * min(predicted * shape.config.vocab_size, at_once) + element * predicted * width
    if settings.gradient_checkpointing:
        names = ("activations: the inputs of the blocks", "logits in chunks, or one block computed again")
        kept: float = shape.layers * batch.tokens * width * element
        workspace = max(logits, block + backward)
        casts /= shape.layers
    else:
        names = ("activations", "logits in chunks, or the gradients inside a block")
        kept, workspace = shape.layers * block, max(logits, backward)
    terms = [Term(names[0], kept + mask + last_norm + casts, phase), Term(names[1], workspace, phase)]
    if settings.quantize is not None:
        terms.append(Term("one weight in full precision", shape.largest * element, phase))
    return terms


def saved_by_block(shape: ModelShape, batch: Batch, element: int, rank: int, everything: bool = False) -> float:
    """Bytes that one block keeps for its backward pass.

    Of each token: two norms in float32, their inverse deviations; queries, keys and values as attention reads them (a
    batch with padding has a mask, and then keys and values are repeated for all heads), its output and the logarithm of
    its sum; the gate before and after its nonlinearity and what it multiplies; r values of each adapted module. Of
    each pair of tokens, the mask, which PyTorch turns into numbers in every block anew.
    """
    width, mlp = shape.config.hidden_size, shape.config.intermediate_size
    per_token: float = 2 * FLOAT * (width + 1)
    per_token += element * 2 * shape.attention + FLOAT * shape.config.num_attention_heads
    per_token += element * 3 * mlp
    per_token += FLOAT * rank * (len(shape.targets) // shape.layers)
    if everything:  # the inputs of all linear layers, and what the norms' weights multiply
        per_token += element * (4 * width + shape.attention + mlp)
    return batch.tokens * per_token + batch.attended * element * 2 * shape.attention + batch.pairs * element


def sampling_terms(
    shape: ModelShape, batch: Batch, prompts: int, element: int, phase: Phase = "sampling"
) -> list[Term]:
    """What the transformers sampler takes; it reads each of ``prompts`` once and answers in ``batch.rows`` rows."""
    # One layer's keys and values exist twice while a token is added to them.
    cache = batch.rows * (batch.prompt + batch.completion) * shape.cache_per_token(element) * (1 + 1 / shape.layers)
    per_token = element * (3 * shape.config.intermediate_size + 2 * shape.config.hidden_size)
    reading = prompts * batch.prompt * (per_token + batch.prompt * (1 + element))
    choosing = batch.rows * shape.config.vocab_size * (element + 3 * FLOAT + 2 * 8)
    return [
        Term("keys and values of all completions", cache, phase),
        Term("reading the prompts, or choosing a token", max(reading, choosing), phase),
    ]
