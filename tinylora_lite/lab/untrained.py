"""The untrained base with its first choice made for it: the controls beside the trained models of the first chapters.

The first control is a constraint on one token: an answer must begin with a number, and every later token is drawn as
usual. The second is a line of prompt: a header that names a writer of the pretraining text, the best one on the
validation split. Both are scored on the test split as the base is. ``python -m benchmarks.untrained`` made the records.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tinylora_lite import nano
from tinylora_lite.lab.store import CHAPTERS
from tinylora_lite.sampling.logprobs import read_prompts
from tinylora_lite.sampling.rollouts import encode_prompts
from tinylora_lite.tasks.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def number_tokens(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The ids of the tokens that are numbers, ``[tokens]`` int64, in ascending order."""
    return torch.tensor(sorted(i for token, i in tokenizer.get_vocab().items() if token.strip().isdigit()))


@torch.no_grad()
def chance_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, allowed: Tensor, problems: int | None = None
) -> float:
    """The mean probability, over test problems, that an answer begins with one of ``allowed``, ``[tokens]`` int64."""
    logits, *_ = read_prompts(model, *encode_prompts(tokenizer, task, task.test[:problems]))
    return float(logits.float().softmax(dim=-1)[:, allowed].sum(dim=-1).mean())


def recorded(base: str = nano.BASE, folder: Path = CHAPTERS) -> dict[str, Any]:
    """The record of a base. Raises ``FileNotFoundError`` where there is none."""
    found: dict[str, Any] = json.loads((folder / base / "controls.json").read_text(encoding="utf-8"))
    return found
