"""Measures the controls without training, whose records :mod:`tinylora_lite.lab.untrained` reads and explains.

``python -m benchmarks.untrained`` writes the record of a base.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tinylora_lite import nano
from tinylora_lite.adapter.adapter import TinyLoraAdapter
from tinylora_lite.evaluation.evaluate import evaluate
from tinylora_lite.lab.store import CHAPTERS
from tinylora_lite.lab.untrained import chance_of, number_tokens
from tinylora_lite.nano.variants import header
from tinylora_lite.nano.writers import ANYONE, WRITERS
from tinylora_lite.sampling.logprobs import read_prompts
from tinylora_lite.sampling.rollouts import Rollouts, Sampler
from tinylora_lite.sampling.sampler import sample
from tinylora_lite.tasks.task import Task
from tinylora_lite.utils.files import atomic_write
from tinylora_lite.utils.record import environment, seed_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SAMPLES = 8
"""Sampled answers to each test problem, as for the plain base."""
SEED = 0
"""Of the sampling."""


@dataclass(frozen=True)
class FirstTokenSampler:
    """Samples answers whose first token is one of a few; the model is renormalised over them at that position only.

    Attributes:
        model: any causal language model of transformers.
        tokenizer: its tokenizer.
        allowed: ``[tokens]`` int64, the ids that an answer may begin with; the end token is not among them.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    allowed: Tensor

    def sync(self, adapter: TinyLoraAdapter | None) -> None:
        """Does nothing: an adapter changes the model itself."""

    @torch.no_grad()
    def sample(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        seed: int = 0,
        first_row: int = 0,
    ) -> Rollouts:
        """One completion for each row of prompts; arguments and result are those of ``sampler.sample``."""
        logits = read_prompts(self.model, prompt_ids, prompt_mask)[0][:, self.allowed].float()
        log_distribution = (logits / (temperature or 1.0)).log_softmax(dim=-1)
        if temperature == 0:
            choice = logits.argmax(dim=-1, keepdim=True)
        else:
            generator = torch.Generator().manual_seed(seed_of("first token", seed, first_row))
            choice = torch.multinomial(log_distribution.exp(), 1, generator=generator)
        first = self.allowed[choice]  # [batch, 1]
        ones = torch.ones_like(first)
        # The chosen token continues the prompt, so that an ordinary sampler draws the rest.
        rest = sample(
            self.model,
            self.tokenizer,
            torch.cat([prompt_ids, first], dim=1),
            torch.cat([prompt_mask, ones], dim=1),
            max_new_tokens=max_new_tokens - 1,
            temperature=temperature,
            seed=seed,
            first_row=first_row,
        )
        ids, mask = torch.cat([first, rest.completion_ids], dim=1), torch.cat([ones, rest.completion_mask], dim=1)
        answers = [row[kept] for row, kept in zip(ids, mask.bool(), strict=True)]
        entropy = torch.special.entr(log_distribution.exp()).sum(dim=-1, keepdim=True)
        return replace(
            rest,
            prompt_ids=prompt_ids,
            prompt_mask=prompt_mask,
            completion_ids=ids,
            completion_mask=mask,
            logprobs=torch.cat([log_distribution.gather(1, choice), rest.logprobs], dim=1),
            entropies=torch.cat([entropy, rest.entropies], dim=1),
            texts=[text.strip() for text in self.tokenizer.batch_decode(answers, skip_special_tokens=True)],
        )


def measure(base: str = nano.BASE, problems: int | None = None) -> dict[str, Any]:
    """Scores a shipped base under both controls.

    Args:
        base: its name.
        problems: of each split; ``None`` takes all.
    """
    model, tokenizer = nano.load(base)
    numbers = number_tokens(tokenizer)
    options: dict[str, Any] = {"problems": problems, "max_new_tokens": nano.MAX_NEW_TOKENS, "seed": SEED}

    def scores(task: Task, sampler: Sampler | None = None) -> dict[str, Any]:
        sampled = evaluate(model, tokenizer, task, samples=SAMPLES, sampler=sampler, **options)
        greedy = evaluate(model, tokenizer, task, temperature=0, sampler=sampler, **options)
        return {"sampled": sampled.summary(), "greedy": greedy.summary()}

    validation = {
        name: evaluate(model, tokenizer, header(name), split="validation", samples=SAMPLES, **options).accuracy
        for name in (ANYONE, *WRITERS)
    }
    best = max(validation, key=lambda name: validation[name])
    return {
        "base": base,
        "settings": options | {"samples": SAMPLES},
        "first_token": {
            "allowed": "numbers",
            "tokens": len(numbers),
            "probability": chance_of(model, tokenizer, nano.task(), numbers, problems),
            **scores(nano.task(), FirstTokenSampler(model, tokenizer, numbers)),
        },
        "header": {"validation": validation, "best": best, **scores(header(best))},
        "environment": environment(),
    }


def main() -> None:
    """Scores a base under both controls and writes the record."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.untrained", description=main.__doc__)
    parser.add_argument("base", nargs="?", default=nano.BASE, help="a shipped base (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=CHAPTERS, help="where the record goes (default: the book's)")
    chosen = parser.parse_args()
    torch.set_num_threads(1)  # models of this size are slower on more
    path = chosen.folder / chosen.base / "controls.json"
    print(atomic_write(path, json.dumps(measure(chosen.base), indent=1) + "\n"), file=sys.stderr)


if __name__ == "__main__":
    main()
