"""Training without gradients: an evolution strategy moves v by the rewards alone.

CMA-ES (Hansen, arXiv 1604.00772) draws candidates from a normal distribution over v, ranks them by reward, and moves
mean, step size and covariance towards the better ones. All candidates are one population and share a batch. They
answer the same prompts with the same random numbers, so hard problems and unlucky draws cancel in their ranking.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from tinylora_lite.adapter.batched import attach_population
from tinylora_lite.adapter.config import TinyLoraConfig
from tinylora_lite.adapter.weights import base_fingerprint
from tinylora_lite.sampling.policy import check_tokenizer
from tinylora_lite.tasks.task import Task
from tinylora_lite.training.batches import draw_prompts, rollout, score
from tinylora_lite.training.loop import RECORDED_PARAMETERS
from tinylora_lite.training.settings import check_integers, check_numbers
from tinylora_lite.utils.distributed import hide_progress
from tinylora_lite.utils.record import Run, base_gguf, seed_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class ESSettings:
    """How to train; a generation samples ``candidates * prompts_per_step`` completions, by default as many as GRPO.

    Attributes:
        generations: rankings of fresh candidates, and moves of the mean.
        candidates: v's drawn for a generation; fewer than four cannot be ranked into halves.
        sigma: the standard deviation of every entry of v in the first generation; the strategy adapts it afterwards.

    The others are those of :class:`~tinylora_lite.GRPOSettings`.

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

    # What sampling and scoring ask of GRPO's settings besides.
    group_size: ClassVar[int] = 1
    truncated: ClassVar[str] = "zero"

    def __post_init__(self) -> None:
        least = {"generations": 1, "candidates": 4, "prompts_per_step": 1, "max_new_tokens": 1, "seed": 0}
        check_integers(vars(self), least)
        check_numbers(vars(self), "temperature", "sigma")


def train_es(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: TinyLoraConfig,
    task: Task,
    settings: ESSettings | None = None,
    *,
    progress: bool = True,
) -> tuple[Run, Tensor]:
    """Trains an adapter's parameters by CMA-ES, from v = 0; arguments are those of :func:`~tinylora_lite.train_grpo`.

    The model carries no adapter, and is left as it was; ``config`` is the adapter's.

    Returns:
        The :class:`~tinylora_lite.Run` and v, ``[groups, u]`` float32: the mean after the last generation, for
        ``adapter.vectors`` of an adapter with the same ``config``. Of each generation the run holds ``reward`` (the
        mean of all candidates, which the spread of ``sigma`` keeps below that of their mean v), ``best`` (of one
        candidate), ``sigma``, ``norm`` (of the mean), ``length`` (mean tokens of a completion), ``tokens`` (sampled so
        far), ``seconds``, and the mean itself as ``v0`` and so on where it is short.

    Raises:
        ModuleNotFoundError: cma is not installed.
        ValueError: the task has no training problems, or whatever :func:`~tinylora_lite.attach_population` refuses.
        FloatingPointError: the model puts out NaN; lower sigma.
    """
    settings = settings or ESSettings()
    own: Any = settings
    check_tokenizer(tokenizer)
    task.check(evaluated=False)
    population, K = attach_population(model, [config] * settings.candidates), settings.candidates
    shape = population.vectors[0].shape
    try:
        strategy = _strategy(shape.numel(), settings)
        run = Run("es", asdict(own), population.identity(0), shape.numel(), task.name, base_fingerprint(model))
        run.base_gguf = base_gguf(model)
        tokens, started = 0, time.perf_counter()
        for step in (bar := tqdm(range(settings.generations), "ES", disable=hide_progress(progress))):
            candidates = strategy.ask()
            with torch.no_grad():
                for v, candidate in zip(population.vectors, candidates, strict=True):
                    v.copy_(torch.from_numpy(candidate).view(shape))
            examples = draw_prompts(task.train, own, step) * K
            rollouts = rollout(model, tokenizer, task, examples, [own] * K, step)
            rewards = score(rollouts, task, examples, own).view(K, -1).mean(dim=1)
            strategy.tell(candidates, (-rewards).tolist())
            tokens += int(rollouts.lengths.sum())
            run.seconds = time.perf_counter() - started
            row = {
                "step": step + 1,
                "reward": rewards.mean().item(),
                "best": rewards.max().item(),
                "sigma": float(strategy.sigma),
                "norm": float(np.linalg.norm(strategy.mean)),
                "length": rollouts.lengths.float().mean().item(),
                "tokens": tokens,
            }
            if run.parameters <= RECORDED_PARAMETERS:
                row |= {f"v{i}": value for i, value in enumerate(strategy.mean.tolist())}
            run.steps.append(row | {"seconds": run.seconds})
            bar.set_postfix_str(f"reward {row['reward']:.2f}", refresh=False)
    finally:
        population.detach()
    return run, torch.tensor(strategy.mean, dtype=torch.float32).view(shape)


def _strategy(parameters: int, settings: ESSettings) -> Any:
    try:
        import cma
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('the evolution strategy needs cma: pip install "tinylora_lite[lab]"') from error
    rng = np.random.default_rng(seed_of("evolution", settings.seed))
    options = {
        "popsize": settings.candidates,
        "randn": lambda *sides: rng.standard_normal(sides),  # its own would reseed numpy's global stream
        "verbose": -10,  # nothing printed, and no file of commands read
        "verb_log": 0,
    }
    return cma.CMAEvolutionStrategy(np.zeros(parameters), settings.sigma, options)
