"""Trains a nano base from scratch: ``python -m tinylora_lite.nano.pretrain``. One command, seeded, resumable.

The base reads the answers of four writers (``writers.py``) to endless training problems. Every document opens
with a system header that names its writer in half of the documents and says "anyone" in the others, so that
the model keeps track of the style, as instruction-tuned models keep track of their system prompt. The loss is on the
answers alone: the problems' numbers are random and teach nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from tinylora_lite.nano.problems import problems
from tinylora_lite.nano.tokenizer import ASSISTANT, build_tokenizer
from tinylora_lite.nano.writers import MIXTURES, write
from tinylora_lite.utils.distributed import hide_progress
from tinylora_lite.utils.files import atomic_write
from tinylora_lite.utils.record import check_same

CHOICES = {"architecture": ("qwen2", "llama"), "mixture": tuple(MIXTURES), "precision": ("fp32", "bf16")}
"""The settings that are names. Here Llama is Qwen2 without the biases of the query, key and value projections; bf16 is
the precision of matrix products, while weights and optimizer stay in fp32. It halves the time of the widest base."""


@dataclass(frozen=True)
class PretrainSettings:
    """The recipe of a nano base; the defaults made ``nano.BASE``."""

    width: int = 128
    layers: int = 7
    heads: int = 4
    kv_heads: int = 2
    mlp: int = 320
    steps: int = 5000
    batch: int = 64
    learning_rate: float = 3e-3
    warmup: int = 100
    weight_decay: float = 0.3
    named: float = 0.5
    seed: int = 0
    architecture: str = "qwen2"
    mixture: str = "default"
    precision: str = "fp32"


LOG_EVERY = 50
"""Steps from one line of the log, and checkpoint, to the next."""
POOL = 32
"""Batches drawn together and sorted by length before they are cut, so that little is padding."""


def build_model(settings: PretrainSettings, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A randomly initialised model of the recipe's architecture, float32, the same for the same seed."""
    config = AutoConfig.for_model(
        settings.architecture,
        vocab_size=len(tokenizer),
        hidden_size=settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        intermediate_size=settings.mlp,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(settings.seed)
    # In bf16, the gradient of PyTorch's fused attention is slow on CPUs, slower than all matrix products together.
    attention = "eager" if settings.precision == "bf16" else "sdpa"
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation=attention).float()
    return model


def pool_of_batches(
    settings: PretrainSettings, tokenizer: PreTrainedTokenizerFast, index: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pool ``index`` of ``POOL`` batches: token ids ``[batch, length]`` and labels, -100 outside the answers.

    A pool depends on the seed and its index alone, so a resumed run reads what the uninterrupted one would.
    """
    rng = random.Random(f"pretrain-{settings.seed}-{index}")
    texts = []
    for problem in islice(problems("train", rng.getrandbits(32)), POOL * settings.batch):
        header, answer = write(problem, rng, settings.named, settings.mixture)
        conversation = [("system", header), ("user", problem.text), ("assistant", answer)]
        messages = [{"role": role, "content": content} for role, content in conversation]
        texts.append(tokenizer.apply_chat_template(messages, tokenize=False))
    documents = [torch.tensor(ids) for ids in sorted(tokenizer(texts)["input_ids"], key=len)]
    batches = [documents[i : i + settings.batch] for i in range(0, len(documents), settings.batch)]
    rng.shuffle(batches)
    assistant = tokenizer.get_vocab()[ASSISTANT]
    for batch in batches:
        ids = pad_sequence(batch, batch_first=True, padding_value=tokenizer.pad_token_id)
        asked = ids.eq(assistant).flip(1).cumsum(1).flip(1).bool()  # up to the mark that opens the answer
        yield ids, ids.masked_fill(asked | ids.eq(tokenizer.pad_token_id), -100)


def learning_rate(settings: PretrainSettings, step: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def pretrain(settings: PretrainSettings, folder: Path) -> PreTrainedModel:
    """Trains a base, leaves its half-precision checkpoint, tokenizer, recipe and log in ``folder``, and returns it.

    An interrupted run goes on from its last line of the log when called again with the same settings, to the same
    weights; a finished one is left as it is.

    Raises:
        ValueError: ``folder`` holds a base, or an unfinished run, of other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state_file, recipe_file = folder / "resume.pt", folder / "recipe.json"
    # A recipe from before a setting existed was made with what is now that setting's default.
    default = asdict(PretrainSettings())
    if recipe_file.exists():
        check_same(folder, "a base", default | json.loads(recipe_file.read_text(encoding="utf-8")), asdict(settings))
        return _load(folder)

    tokenizer = build_tokenizer()
    model = build_model(settings, tokenizer)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim != 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98), fused=True)
    last: dict[str, Any] = {"step": 0, "tokens": 0, "seconds": 0.0}
    log = []
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        check_same(folder, "a base", default | state["settings"], asdict(settings))
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        log, last = state["log"], state["log"][-1]

    step, tokens, started = last["step"], last["tokens"], time.perf_counter() - last["seconds"]
    losses: list[float] = []
    with tqdm(total=settings.steps, initial=step, desc="pretraining", disable=hide_progress()) as bar:
        while step < settings.steps:
            batches = list(pool_of_batches(settings, tokenizer, step // POOL))[step % POOL :]
            for ids, labels in batches[: settings.steps - step]:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(settings, step)
                with torch.autocast("cpu", torch.bfloat16, enabled=settings.precision == "bf16"):
                    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
                tokens += int((ids != tokenizer.pad_token_id).sum())
                step += 1
                bar.update()
                if step % LOG_EVERY == 0 or step == settings.steps:
                    row = {"step": step, "loss": round(sum(losses) / len(losses), 4), "tokens": tokens}
                    log.append(row | {"seconds": round(time.perf_counter() - started, 1)})
                    losses.clear()
                    bar.write(json.dumps(log[-1]))
                    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "log": log}
                    atomic_write(state_file, partial(torch.save, state | {"settings": asdict(settings)}))

    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    atomic_write(folder / "pretrain.jsonl", "".join(json.dumps(row) + "\n" for row in log))
    # The recipe comes last: a folder that has one holds a finished base.
    atomic_write(recipe_file, json.dumps(asdict(settings), indent=2) + "\n")
    state_file.unlink(missing_ok=True)
    return _load(folder)


def _load(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Trains a nano base from scratch: about 40 minutes on two cores.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--folder", type=Path, default=Path("nano-base"), help="where the base goes")
    for name, value in asdict(PretrainSettings()).items():
        flag, choices = f"--{name.replace('_', '-')}", CHOICES.get(name)
        parser.add_argument(flag, type=type(value), default=value, choices=choices, help=" ")
    arguments = vars(parser.parse_args())
    try:
        pretrain(folder=arguments.pop("folder"), settings=PretrainSettings(**arguments))
    except ValueError as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
