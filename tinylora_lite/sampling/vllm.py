"""vLLM as the sampler, in the process that trains: the adapter follows as a LoRA, or inside the weights.

As a LoRA of rank r, which ``(U Σ) R Vᵀ`` is: vLLM computes it beside the base, as the trainer does. So an update of any
size survives, and a few megabytes are handed over at each step, whatever the size of the base. Merged, as in the paper:
every adapted weight is pushed, and rounding to the engine's dtype removes small updates
(:func:`~tinylora_lite.merge_report`), which truncated importance sampling has to correct. Both start from the pristine
base at every step, so no rounding accumulates.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tinylora_lite.adapter.weights import dense_weight
from tinylora_lite.files.lora import export_lora
from tinylora_lite.files.merge import merged_weights
from tinylora_lite.sampling.rollouts import Rollouts, check_tokenizer
from tinylora_lite.utils import distributed
from tinylora_lite.utils.record import seed_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tinylora_lite.adapter.adapter import TinyLoraAdapter

Sync = Literal["lora", "merged"]

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks that vLLM reserves memory for; a LoRA of another rank takes the next larger one."""

NOT_FINITE = "the model puts out NaN; lower the learning rate, or start vLLM in a wider dtype"


class Answer(NamedTuple):
    """One completion: its tokens, the end token included, their log-probabilities, and whether the limit cut it."""

    tokens: Sequence[int]
    logprobs: Sequence[float]
    truncated: bool


class VllmEngine(ABC):
    """What an engine in this process and a server share: requests from prompts, and rollouts from answers."""

    limit: int
    """Tokens of the longest prompt and completion together."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        check_tokenizer(tokenizer)
        self.tokenizer = tokenizer  # the trainer's; vLLM itself is given token ids and needs none

    @abstractmethod
    def _answer(
        self, prompts: list[list[int]], seeds: list[int], max_new_tokens: int, temperature: float
    ) -> list[Answer]:
        """One answer for each prompt, with log-probabilities at the temperature of the draw."""

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
        """One completion for each row of prompts; see :func:`~tinylora_lite.sampling.sampler.sample`.

        Every row draws from a stream of its own, made of ``seed`` and its place from ``first_row`` on. So it stays the
        same when a batch is answered in parts or by several processes.

        Raises:
            ValueError: ``max_new_tokens`` is below 1, ``temperature`` below 0, a prompt and its completion could exceed
                ``max_model_len``, or a server reports probabilities at another temperature.
            ConnectionError: a server does not answer, or not in time.
            FloatingPointError: the model puts out NaN or infinity. vLLM on a CPU may keep it in its cache, and read it
                again with another adapter; it has to be started anew.
        """
        prompts = [ids[mask.bool()].tolist() for ids, mask in zip(prompt_ids.cpu(), prompt_mask.cpu(), strict=True)]
        if max_new_tokens < 1 or temperature < 0:
            raise ValueError(
                f"max_new_tokens must be at least 1 and temperature at least 0, not {max_new_tokens} and {temperature}"
            )
        longest = max(map(len, prompts))
        if longest + max_new_tokens > self.limit:
            raise ValueError(
                f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed vLLM's max_model_len of "
                f"{self.limit}; ask for fewer, or start it with more"
            )
        seeds = [seed_of("row", seed, first_row + row) for row in range(len(prompts))]
        answers = self._answer(prompts, seeds, max_new_tokens, temperature)
        return rollouts_of(self.tokenizer, prompt_ids, prompt_mask, answers)


class VllmSampler(VllmEngine):
    """A vLLM engine that answers with the adapter as it was at the last :meth:`sync`; before the first, with the base.

    On a GPU that the trainer uses too, load the trainer's model first, then the engine. ``gpu_memory`` is its share of
    the whole GPU, its copy of the weights included (15.2 GB of a 7B model in bfloat16); the rest must hold the
    trainer's activations and logits. Several training processes share a server instead
    (:class:`~tinylora_lite.sampling.vllm_server.VllmServerSampler`).

    Args:
        model: a checkpoint's folder, or its name on the hub: the base that the adapter was made for.
        tokenizer: the trainer's.
        sync: ``"lora"`` or ``"merged"``; see the head of this module.
        max_model_len: tokens of the longest prompt and completion together; ``None`` takes the model's own limit.
        gpu_memory: the engine's share of the GPU's memory, 0 to 1. A CPU ignores it: keys and values get 1 GiB, or the
            ``kv_cache_memory_bytes`` that are given.
        tensor_parallel: GPUs that share every layer.
        dtype: of the engine; ``"auto"`` takes the checkpoint's. LoRAs are rounded to it, which costs less than 1 % of
            the update in bfloat16.
        seed: of the engine; samples depend on the seed of :meth:`sample`, and not on this one.
        max_lora_rank: the largest rank of an adapter to come.
        sleep: frees the GPU's memory after every sampling; the weights wait in the machine's memory.
        engine: further arguments of ``vllm.LLM``; they override those above. ``enforce_eager=True``, the default on a
            CPU, starts sooner and samples slower.

    Attributes:
        llm: the ``vllm.LLM``.

    Raises:
        ImportError: vLLM is not installed.
        ValueError: an unknown ``sync``, a tokenizer without what sampling needs, a rank that vLLM does not serve,
            weights to merge into a quantized engine, or one of several training processes.
    """

    def __init__(
        self,
        model: str | Path,
        tokenizer: PreTrainedTokenizerBase,
        *,
        sync: Sync = "lora",
        max_model_len: int | None = None,
        gpu_memory: float = 0.3,
        tensor_parallel: int = 1,
        dtype: str = "auto",
        seed: int = 0,
        max_lora_rank: int = 8,
        sleep: bool = False,
        **engine: Any,
    ) -> None:
        if sync not in get_args(Sync):
            raise ValueError(f"sync must be one of {', '.join(get_args(Sync))}, not {sync!r}")
        super().__init__(tokenizer)
        self.max_lora_rank = reserved_rank(max_lora_rank) if sync == "lora" else 0
        if distributed.world_size() > 1:
            raise ValueError("several processes train, and an engine lives in one; share a server: VllmServerSampler")
        try:
            import vllm
        except ImportError as error:
            raise ImportError('sampling with vLLM needs vLLM: pip install "tinylora_lite[vllm]"') from error
        settings: dict[str, Any] = {
            "model": str(model),
            "dtype": dtype,
            "seed": seed,
            "tensor_parallel_size": tensor_parallel,
            "gpu_memory_utilization": gpu_memory,
            "max_model_len": max_model_len,
            "enforce_eager": _on_cpu(),
            "enable_sleep_mode": sleep,
            "skip_tokenizer_init": True,
            "logprobs_mode": "processed_logprobs",  # at the temperature of the draw; raw ones would be at 1
        }
        if _on_cpu():
            # Where a prompt is read in chunks, vLLM rewinds the row's generator, which no CPU generator can.
            settings |= {"kv_cache_memory_bytes": 2**30, "enable_chunked_prefill": False}
        if sync == "lora":
            settings |= {"enable_lora": True, "max_lora_rank": self.max_lora_rank, "max_loras": 1}
        logging.getLogger("vllm.renderers.base").addFilter(_is_error)
        # The engine seeds torch's own generators, which are the trainer's.
        with _in_this_process(), torch.random.fork_rng():
            self.llm = vllm.LLM(**settings | engine)
        if sync == "merged" and self.llm.model_config.quantization is not None:
            raise ValueError("weights cannot be merged into a quantized engine; use sync='lora'")
        self.mode, self.limit = sync, self.llm.model_config.max_model_len
        self._sleeps, self._asleep = sleep, False
        self._count = 0
        self._lora: Any = None  # the LoRARequest that answers
        self._folder: tempfile.TemporaryDirectory[str] | None = None  # its files
        self._pushed: TinyLoraAdapter | None = None  # the last adapter that was merged

    def sync(self, adapter: TinyLoraAdapter | None) -> None:
        """From now on samples come from the base with ``adapter`` as it is now, or from the base alone (``None``).

        Raises:
            ValueError: the adapter's rank is above ``max_lora_rank``, its model is gone, or its parameters are not
                finite.
        """
        self._wake()
        if self.mode == "lora":
            self._swap(adapter)
        else:
            self._push(adapter)
        # Cached prompts have keys and values of the weights before.
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM's prefix cache is in use and holds keys and values of other weights")

    def _answer(
        self, prompts: list[list[int]], seeds: list[int], max_new_tokens: int, temperature: float
    ) -> list[Answer]:
        from vllm import SamplingParams

        self._wake()
        settings = [
            SamplingParams(
                temperature=temperature,
                max_tokens=max_new_tokens,
                seed=seed,
                stop_token_ids=[self.tokenizer.eos_token_id],  # vLLM adds those of generation_config.json
                logprobs=0,  # of the drawn token and no other
                flat_logprobs=True,
                detokenize=False,
            )
            for seed in seeds
        ]
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        done = self.llm.generate(requests, settings, lora_request=self._lora, use_tqdm=False)
        if self._sleeps:
            self.llm.sleep(level=1)
            self._asleep = True
        outputs = [request.outputs[0] for request in done]
        return [Answer(each.token_ids, each.logprobs.logprobs, each.finish_reason == "length") for each in outputs]

    def _swap(self, adapter: TinyLoraAdapter | None) -> None:
        from vllm.lora.request import LoRARequest

        before, folder, lora = self._lora, None, None
        if adapter is not None:
            rank = adapter.config.rank
            if rank > self.max_lora_rank:
                raise ValueError(
                    f"the adapter is of rank {rank}, and vLLM was started for ranks up to {self.max_lora_rank}; "
                    f"start it with max_lora_rank={reserved_rank(rank)}"
                )
            folder = tempfile.TemporaryDirectory(prefix="tinylora-")
            self._count += 1  # vLLM takes a number that it has seen for a LoRA that it has
            path = export_lora(adapter, Path(folder.name) / "lora")
            lora = LoRARequest(f"tinylora-{self._count}", self._count, str(path))
            self.llm.llm_engine.add_lora(lora)
        if before is not None:
            self.llm.llm_engine.remove_lora(before.lora_int_id)
        self._lora, self._folder = lora, folder

    def _push(self, adapter: TinyLoraAdapter | None) -> None:
        latest = adapter or self._pushed
        if latest is None:
            return
        model, dtype = latest._model(), self.llm.model_config.dtype
        if model is None:
            raise ValueError("the adapter's model no longer exists, and the base's weights with it; make a new sampler")
        names, merged = (adapter.names, merged_weights(adapter, dtype)) if adapter else ((), iter(()))
        stale = [name for name in (self._pushed.names if self._pushed else ()) if name not in names]
        self._pushed = adapter  # even where not all of its weights arrive
        if _on_cpu():
            weights = list((model.state_dict() | dict(merged)).items())
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
            return
        pristine = ((f"{name}.weight", dense_weight(model.get_submodule(name)).to(dtype)) for name in stale)
        alone = self.llm.llm_engine.vllm_config.parallel_config.world_size == 1
        for name, weight in chain(pristine, merged):
            # Other processes get it through a pipe, and they have other devices.
            self.llm.collective_rpc(_load_weight, args=(name, weight if alone else weight.cpu()))

    def _wake(self) -> None:
        if self._asleep:
            self.llm.wake_up()
            self._asleep = False


def reserved_rank(rank: int) -> int:
    """The smallest of vLLM's ``RANKS`` that holds a LoRA of a rank. Raises ``ValueError`` above the largest."""
    if not 1 <= rank <= RANKS[-1]:
        raise ValueError(f"vLLM serves LoRAs of rank 1 to {RANKS[-1]}, not {rank}; synchronise merged weights instead")
    return min(reserved for reserved in RANKS if reserved >= rank)


def rollouts_of(
    tokenizer: PreTrainedTokenizerBase, prompt_ids: Tensor, prompt_mask: Tensor, answers: Sequence[Answer]
) -> Rollouts:
    """Answers as the batch that training takes, on the device of the prompts, both ``[batch, prompt]`` int64.

    Raises:
        FloatingPointError: a log-probability is not finite.
    """
    rows = [torch.tensor(answer.tokens, dtype=torch.long) for answer in answers]
    logprobs = pad_sequence([torch.tensor(answer.logprobs, dtype=torch.float32) for answer in answers], True)
    if not logprobs.isfinite().all():
        raise FloatingPointError(NOT_FINITE)
    device, pad = prompt_ids.device, float(tokenizer.pad_token_id)
    texts = tokenizer.batch_decode([row.tolist() for row in rows], skip_special_tokens=True)
    return Rollouts(
        prompt_ids,
        prompt_mask,
        pad_sequence(rows, True, pad).to(device),
        pad_sequence([torch.ones_like(row) for row in rows], True).to(device),
        logprobs.to(device),
        -logprobs.to(device),
        torch.tensor([answer.truncated for answer in answers], device=device),
        [text.strip() for text in texts],
    )


def _load_weight(worker: Any, name: str, weight: Tensor) -> None:
    """Runs in every worker; vLLM's loader finds the place inside ``qkv_proj`` and ``gate_up_proj``."""
    worker.get_model().load_weights([(name, weight)])


def _on_cpu() -> bool:
    """Whether vLLM computes on the CPU; its layers then reorder their weights, and cannot load a single one."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def _is_error(record: logging.LogRecord) -> bool:
    """Drops vLLM's warning, with a traceback, that it has no tokenizer to try a chat template with."""
    return record.levelno >= logging.ERROR


@contextmanager
def _in_this_process() -> Iterator[None]:
    """Engines that are made inside run in this process, where weights change hands without a copy."""
    name = "VLLM_ENABLE_V1_MULTIPROCESSING"
    before = os.environ.get(name)
    os.environ[name] = "0"
    try:
        with redirect_stdout(sys.__stdout__):  # vLLM asks it for a file descriptor, which a notebook's may lack
            yield
    finally:
        os.environ.pop(name)
        os.environ.update({} if before is None else {name: before})
