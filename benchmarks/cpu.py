"""A real model on one core: decoding and updating, as a share of what its matrix products alone would allow.

``python -m benchmarks.cpu [BASE]`` measures a base and puts it into the record, beside the others. All times are CPU
seconds of one thread: other jobs on the machine slow the products as they slow the rest.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor, nn

from tinylora_lite.utils.cpu import keep_memory
from tinylora_lite.utils.files import atomic_write
from tinylora_lite.utils.record import environment

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tinylora_lite.sampling.rollouts import Rollouts

RECORD = Path(__file__).parents[1] / "book" / "results" / "cpu.json"
BATCHES, LENGTHS = (128, 64, 16, 4, 1), (128, 48, 16)
"""The largest first: a run has its memory from its first step on."""
GROUP = 8
"""Answers to one prompt."""
AT_ONCE = 3072
"""Tokens of completions in one forward and backward pass, at most."""


def measure(base: str, dtype: str, batches: list[int], lengths: list[int]) -> dict[str, Any]:
    """Tokens a second of decoding and of an update with 13 parameters, and their shares of the products'.

    The prompts are word problems of one step after two worked examples. Answers have one length each: nothing ends
    them. Decoding is what a longer answer takes beyond the first token, so that reading the prompts is not in it; an
    update is forward and backward pass, the prompts read once more included, and its products are those of its
    completions alone.
    """
    import tinylora_lite as tl
    from tinylora_lite import nano
    from tinylora_lite.adapter.svd import decompose
    from tinylora_lite.experiment.models import gguf_file, load_model, load_tokenizer
    from tinylora_lite.files.gguf import gguf_sha256
    from tinylora_lite.sampling.rollouts import encode_prompts
    from tinylora_lite.sampling.sampler import sample

    torch.set_num_threads(1)
    keep_memory()  # as the commands do
    model, tokenizer = load_model(base, dtype=dtype, device="cpu"), load_tokenizer(base)
    modules = sum(isinstance(module, nn.Linear) for module in model.modules()) - 1
    adapter = tl.attach(model, tl.TinyLoraConfig(rank=2, u=1, n_tie=-(-modules // 13)))
    adapted = [model.get_submodule(name).get_parameter("weight") for name in adapter.names]
    decomposed = sum(_timed(decompose, weight, 2)[1] for weight in adapted)
    nn.init.normal_(adapter.vectors, std=1e-3)
    task = nano.word_problems(1).with_shots(2)
    ids, mask = encode_prompts(tokenizer, task, task.train[: -(-max(batches) // GROUP)])
    ids, mask = (tensor.repeat_interleave(GROUP, dim=0) for tensor in (ids, mask))

    rows: list[dict[str, float]] = []
    with mock.patch("tinylora_lite.sampling.sampler.end_ids", return_value=torch.tensor([-1])):
        for batch in batches:
            prompts = (model, tokenizer, ids[:batch], mask[:batch])
            sample(*prompts, max_new_tokens=2)
            _, first = _timed(sample, *prompts, max_new_tokens=1)
            for length in lengths:
                tokens, together = batch * length, min(512, batch * length)
                # Products before and after, since what else runs on the machine changes from minute to minute.
                products = [_products(model, batch, backward=False)]
                rollouts, whole = _timed(sample, *prompts, max_new_tokens=length, seed=length)
                products.append(_products(model, batch, backward=False))
                both = [_products(model, together, backward=True)]
                _, update = _timed(_update, model, adapter.vectors, rollouts)
                both.append(_products(model, together, backward=True))
                decode = whole - first
                rows.append(
                    {
                        "batch": batch,
                        "length": length,
                        "decode_tokens_per_second": (tokens - batch) / decode,
                        "decode_share": statistics.fmean(products) * (length - 1) / decode,
                        "update_tokens_per_second": tokens / update,
                        "update_share": statistics.fmean(both) * tokens / together / update,
                    }
                )
                print(json.dumps(rows[-1]), flush=True)
    file = gguf_file(base)
    about = {"dtype": dtype, "modules": modules, "prompt": int(mask[:batch].sum()) / batch, "shots": 2}
    about |= {"decomposition_seconds": decomposed}
    about |= {"gguf_sha256": gguf_sha256(file)} if file else {}
    return about | {"parameters": adapter.num_parameters, "rows": rows, "environment": environment()}


def _products(model: PreTrainedModel, rows: int, backward: bool) -> float:
    """CPU seconds of the products of all linear layers and the head with so many rows, the median of three.

    Backward, each has a second one, with the gradient of its output; frozen weights need none of their own.
    """
    weights = [module.weight.detach() for module in model.modules() if isinstance(module, nn.Linear)]
    sides = {side: torch.randn(rows, side, dtype=model.dtype) for weight in weights for side in weight.shape}

    def work() -> None:
        for weight in weights:
            nn.functional.linear(sides[weight.shape[1]], weight)
            if backward:
                sides[weight.shape[0]] @ weight

    work()
    return statistics.median(_timed(work)[1] for _ in range(3))


def _update(model: PreTrainedModel, vectors: Tensor, rollouts: Rollouts) -> None:
    from tinylora_lite.sampling.logprobs import completion_logprobs
    from tinylora_lite.sampling.policy import ready_to_train
    from tinylora_lite.training.losses import grpo_loss

    vectors.grad = None
    advantages = torch.tensor([1.0, -1.0]).repeat(len(rollouts))[: len(rollouts)]
    size = max(1, AT_ONCE // rollouts.completion_ids.shape[1])
    with ready_to_train(model, [vectors]):
        for some in torch.arange(len(rollouts)).split(size):
            part = rollouts.rows(some)
            logprobs = completion_logprobs(model, part)
            grpo_loss(logprobs, logprobs.detach(), advantages[some], part.completion_mask).backward()


def _timed(work: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[Any, float]:
    start = time.process_time()
    result = work(*arguments, **options)
    return result, time.process_time() - start


def main() -> None:
    """Measures a base and writes it into the record, beside those that are there."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=main.__doc__)
    parser.add_argument("base", nargs="?", default="smollm2-135m", help="as tinylora takes it (default: %(default)s)")
    parser.add_argument("--name", help="of the base in the record (default: the same)")
    parser.add_argument("--dtype", default="float32", help="of the base (default: %(default)s)")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="rows (default: %(default)s)")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RECORD, help="the record (default: the book's)")
    chosen = parser.parse_args()
    record = json.loads(chosen.out.read_text()) if chosen.out.exists() else {}
    record[chosen.name or chosen.base] = measure(chosen.base, chosen.dtype, chosen.batches, chosen.lengths)
    print(atomic_write(chosen.out, json.dumps(record, indent=1) + "\n"), file=sys.stderr)


if __name__ == "__main__":
    main()
