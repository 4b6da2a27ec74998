"""Training without gradients: an evolution strategy moves the numbers by their rewards alone.

With 13 numbers the policy gradient has 13 entries, and 13 numbers can be searched. CMA-ES (Hansen, arXiv 1604.00772)
draws candidates from a normal distribution over v, ranks them by reward, and moves mean, step size and covariance
towards the better ones. All candidates are members of one population and share a batch; nothing is differentiated, so
no activations are kept, and any reward and any sampler will do.

Every candidate of a generation answers the same prompts with the same random numbers: what is common to all of them,
hard problems and unlucky draws, cancels in their ranking, which is all that the strategy looks at.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from tinylora_lite.adapter.batched import Population, attach_population
from tinylora_lite.adapter.config import TinyLoraConfig
from tinylora_lite.adapter.weights import base_fingerprint
from tinylora_lite.sampling.rollouts import Rollouts, encode_prompts
from tinylora_lite.sampling.sampler import sample
from tinylora_lite.tasks.task import Example, Task
from tinylora_lite.training.batches import check_task, draw_prompts
from tinylora_lite.training.loop import RECORDED_PARAMETERS
from tinylora_lite.training.settings import GRPOSettings
from tinylora_lite.utils.distributed import hide_progress
from tinylora_lite.utils.record import Run, seed_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class ESSettings:
    """How to train; a generation samples ``candidates * prompts_per_step`` completions, by default as many as GRPO.

    Attributes:
        generations: rankings of fresh candidates, and moves of the mean.
        candidates: v's drawn for a generation.
        prompts_per_step: prompts drawn for one generation, in the order in which GRPO draws them.
        max_new_tokens: the length limit of a completion; one that is cut off there earns nothing.
        temperature: of sampling.
        sigma: the standard deviation of every entry of v in the first generation; the strategy adapts it afterwards.
        seed: moves the candidates, the order of prompts and the sampling.

    Raises:
        ValueError: a setting is outside its range.
    """

    generations: int = 40
    candidates: int = 8
    prompts_per_step: int = 32
    max_new_tokens: int = 256
    temperature: float = 1.0
    sigma: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        counted = {"generations": 1, "candidates": 4, "prompts_per_step": 1, "max_new_tokens": 1, "seed": 0}
        for name, least in counted.items():
            value = getattr(self, name)
            if type(value) is not int or value < least:
                why = " (fewer cannot be ranked into halves)" if name == "candidates" else ""
                raise ValueError(f"{name} must be an integer of at least {least}{why}, not {value!r}")
        for name in ("temperature", "sigma"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a finite number above 0, not {value!r}")


def train_es(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: TinyLoraConfig,
    task: Task,
    settings: ESSettings | None = None,
    *,
    on_step: Callable[[Run], None] | None = None,
    progress: bool = True,
) -> tuple[Run, Tensor]:
    """Trains an adapter's numbers by CMA-ES, from v = 0.

    Args:
        model: carries no adapter; it is left as it was.
        tokenizer: the model's.
        config: the adapter.
        task: prompts come from its training split.
        settings: see :class:`ESSettings`; ``None`` takes its defaults.
        on_step: called with the run so far after every generation.
        progress: shows a bar where standard error is a terminal.

    Returns:
        The :class:`~tinylora_lite.Run` and v, ``[groups, u]`` float32: the mean after the last generation, for
        ``adapter.vectors`` of an adapter with the same ``config``. Of each generation the run holds ``reward`` (the
        mean of all candidates, which the spread of ``sigma`` keeps below that of their mean v), ``best`` (of one
        candidate), ``sigma``, ``norm`` (of the mean), ``length`` (mean tokens of a completion), ``tokens`` (sampled so
        far), ``seconds``, and the mean itself as ``v0`` and so on where it is short.

    Raises:
        ModuleNotFoundError: cma is not installed.
        ValueError: the task has no training problems, or whatever
            :func:`~tinylora_lite.attach_population` refuses.
        FloatingPointError: the model puts out NaN; lower sigma.
    """
    settings = settings or ESSettings()
    drawing = GRPOSettings(prompts_per_step=settings.prompts_per_step, seed=settings.seed)
    check_task(tokenizer, task, drawing)
    population = attach_population(model, [config] * settings.candidates)
    shape = population.vectors[0].shape
    try:
        strategy = _strategy(shape.numel(), settings)
        base, of = base_fingerprint(model), population.identity(0)
        run = Run("es", asdict(settings), of, shape.numel(), task.name, base)
        tokens, started = 0, time.perf_counter()
        for step in (bar := tqdm(range(settings.generations), "ES", disable=hide_progress(progress))):
            candidates = strategy.ask()
            with torch.no_grad():
                for v, candidate in zip(population.vectors, candidates, strict=True):
                    v.copy_(torch.from_numpy(candidate).view(shape))
            examples = draw_prompts(task.train, drawing, step)
            rollouts = _answers(model, tokenizer, population, task, examples, settings, step)
            rewards = _rewards(rollouts, task, examples, settings)
            strategy.tell(candidates, (-rewards).tolist())
            tokens += int(rollouts.lengths.sum())
            run.seconds = time.perf_counter() - started
            run.steps.append(
                {
                    "step": step + 1,
                    "reward": rewards.mean().item(),
                    "best": rewards.max().item(),
                    "sigma": float(strategy.sigma),
                    "norm": float(np.linalg.norm(strategy.mean)),
                    "length": rollouts.lengths.float().mean().item(),
                    "tokens": tokens,
                    **({f"v{i}": float(x) for i, x in enumerate(strategy.mean)} if _is_short(shape) else {}),
                    "seconds": run.seconds,
                }
            )
            bar.set_postfix_str(f"reward {run.steps[-1]['reward']:.2f}", refresh=False)
            if on_step is not None:
                on_step(run)
    finally:
        population.detach()
    return run, torch.from_numpy(np.array(strategy.mean)).float().view(shape)


def _strategy(numbers: int, settings: ESSettings) -> Any:
    try:
        import cma
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'the evolution strategy needs cma; pip install "tinylora_lite[lab]" brings it'
        ) from error
    rng = np.random.default_rng(seed_of("evolution", settings.seed))
    options = {
        "popsize": settings.candidates,
        "randn": lambda *sides: rng.standard_normal(sides),  # its own would reseed numpy's global stream
        "verbose": -10,  # nothing printed, and no file of commands read
        "verb_log": 0,
    }
    return cma.CMAEvolutionStrategy(np.zeros(numbers), settings.sigma, options)


def _answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    population: Population,
    task: Task,
    examples: list[Example],
    settings: ESSettings,
    step: int,
) -> Rollouts:
    """An answer of every candidate to every prompt, those of one candidate in consecutive rows."""
    ids, mask = encode_prompts(tokenizer, task, examples)
    K, stream = len(population), seed_of("rollout", settings.seed, step)
    return sample(
        model,
        tokenizer,
        ids.repeat(K, 1),
        mask.repeat(K, 1),
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        adapters=torch.arange(K).repeat_interleave(len(examples)),
        streams=[(stream, place) for place in range(len(examples))] * K,
    )


def _rewards(rollouts: Rollouts, task: Task, examples: list[Example], settings: ESSettings) -> Tensor:
    """The mean reward of every candidate, ``[candidates]`` float32."""
    golds = [example.gold for example in examples] * settings.candidates
    rewards = torch.tensor([task.score(text, gold) for text, gold in zip(rollouts.texts, golds, strict=True)])
    rewards[rollouts.truncated] = 0.0
    return rewards.view(settings.candidates, -1).mean(dim=1)


def _is_short(shape: torch.Size) -> bool:
    return shape.numel() <= RECORDED_PARAMETERS
