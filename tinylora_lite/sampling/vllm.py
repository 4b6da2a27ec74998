"""vLLM as the sampler, in the process that trains: the adapter follows as a LoRA, or inside the weights.

As a LoRA, which ``(U Σ) R Vᵀ`` is, of rank r: vLLM computes it beside the base, as the trainer does. So an update of
any size survives, and a few megabytes are handed over at each step, whatever the base weighs. Merged, as the paper does
it: every adapted weight is pushed, and rounding to the engine's dtype takes small updates away
(:func:`~tinylora_lite.merge_report`), which truncated importance sampling has to make good. Both start from
the pristine base at every step, so no rounding is carried on.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from tinylora_lite.adapter.weights import dense_weight
from tinylora_lite.files.lora import export_lora
from tinylora_lite.files.merge import merged_weights
from tinylora_lite.sampling.rollouts import Rollouts
from tinylora_lite.sampling.vllm_answers import (
    check_ends,
    check_rank,
    check_request,
    prompt_rows,
    rollouts_of,
    room_for,
    row_seeds,
)
from tinylora_lite.utils import distributed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tinylora_lite.adapter.adapter import TinyLoraAdapter

Way = Literal["lora", "merged"]


class VllmSampler:
    """A vLLM engine that answers with the adapter as it was at the last :meth:`sync`; before the first, with the base.

    On a GPU that the trainer uses too, load the trainer's model first, then the engine: ``gpu_memory`` is its share of
    the whole card, its own copy of the weights included (15.2 GB of a 7B model in bfloat16), and what is left must hold
    the trainer's activations and logits. Where the two do not fit side by side, ``sleep=True`` has the engine hand its
    memory back after every sampling; its weights wait in the machine's memory then.

    It lives in one process. Several training processes share a server instead, whose ``tensor_parallel`` can be as
    large as a node (:class:`~tinylora_lite.sampling.vllm_server.VllmServerSampler`).

    Args:
        model: a checkpoint's folder, or its name on the hub: the base that the adapter was made for.
        tokenizer: the trainer's. vLLM itself is given token ids and needs none.
        sync: ``"lora"`` or ``"merged"``; see the head of this module.
        max_model_len: tokens of the longest prompt and completion together; ``None`` takes the model's own limit, and
            the engine must have room for one sequence as long.
        gpu_memory: the engine's share of the card's memory, 0 to 1. On a CPU it counts for nothing: keys and values get
            1 GiB, or the ``kv_cache_memory_bytes`` that are given.
        tensor_parallel: GPUs that share every layer.
        dtype: of the engine, ``"auto"`` takes the checkpoint's. LoRAs are rounded to it, which costs less than 1 % of
            the update in bfloat16.
        seed: of the engine; samples depend on the seed that :meth:`sample` is given, and not on this one.
        max_lora_rank: the largest rank of an adapter that will come.
        enforce_eager: starts sooner and samples slower: no compilation, no CUDA graphs. ``None`` does so on a CPU.
        sleep: hands the GPU's memory back after every sampling.
        engine: further arguments of ``vllm.LLM``; they win over those above.

    Attributes:
        llm: the ``vllm.LLM``.
        way: how it is kept in step, ``"lora"`` or ``"merged"``.

    Raises:
        ImportError: vLLM is not installed.
        ValueError: an unknown way to synchronise, a tokenizer without an end or a pad token, a rank that vLLM has no
            room for, weights to merge into a quantized engine, or one of several training processes.
    """

    def __init__(
        self,
        model: str | Path,
        tokenizer: PreTrainedTokenizerBase,
        *,
        sync: Way = "lora",
        max_model_len: int | None = None,
        gpu_memory: float = 0.3,
        tensor_parallel: int = 1,
        dtype: str = "auto",
        seed: int = 0,
        max_lora_rank: int = 8,
        enforce_eager: bool | None = None,
        sleep: bool = False,
        **engine: Any,
    ) -> None:
        if sync not in get_args(Way):
            raise ValueError(f"sync must be one of {', '.join(get_args(Way))}, not {sync!r}")
        check_ends(tokenizer)
        room = room_for(max_lora_rank) if sync == "lora" else 0
        if distributed.world_size() > 1:
            raise ValueError("several processes train, and an engine lives in one; share a server: VllmServerSampler")
        make_engine = _vllm().LLM
        settings: dict[str, Any] = {
            "model": str(model),
            "dtype": dtype,
            "seed": seed,
            "tensor_parallel_size": tensor_parallel,
            "gpu_memory_utilization": gpu_memory,
            "max_model_len": max_model_len,
            "enforce_eager": _on_cpu() if enforce_eager is None else enforce_eager,
            "enable_sleep_mode": sleep,
            "skip_tokenizer_init": True,
            "logprobs_mode": "processed_logprobs",  # at the temperature of the draw; raw ones would be at 1
        }
        if _on_cpu():
            # Where a prompt is read in parts, vLLM rewinds the row's generator, which no generator of a CPU can.
            settings |= {"kv_cache_memory_bytes": 2**30, "enable_chunked_prefill": False}
        if sync == "lora":
            settings |= {"enable_lora": True, "max_lora_rank": room, "max_loras": 1}
        # The engine seeds torch's own generators, and they are the trainer's.
        with _in_this_process(), _no_word_of_templates(), torch.random.fork_rng():
            self.llm = make_engine(**settings | engine)
        if sync == "merged" and self.llm.model_config.quantization is not None:
            raise ValueError("weights cannot be merged into a quantized engine; use sync='lora'")
        self.tokenizer, self.way, self.room = tokenizer, sync, room
        self._sleeps, self._asleep = sleep, False
        self._count = 0
        self._lora: Any = None  # the LoRARequest that answers
        self._folder: tempfile.TemporaryDirectory[str] | None = None  # where it lies
        self._pushed: TinyLoraAdapter | None = None  # the last adapter that was merged

    def sync(self, adapter: TinyLoraAdapter | None) -> None:
        """From now on samples come from the base with ``adapter`` as it is now, or from the base alone (``None``).

        Raises:
            ValueError: the adapter's rank is above ``max_lora_rank``, its model is gone, or its numbers are not finite.
        """
        self._wake()
        if self.way == "lora":
            self._swap(adapter)
        else:
            self._push(adapter)
        # Prompts that were read before were read by other weights.
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM's prefix cache is in use and holds keys and values of other weights")

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

        Every row draws from a stream of its own, made of ``seed`` and its place from ``first_row`` on.

        Raises:
            ValueError: ``max_new_tokens`` is below 1, ``temperature`` below 0, or a prompt and its completion could
                exceed ``max_model_len``.
            FloatingPointError: the model puts out NaN or infinity. vLLM on a CPU may keep it in its cache, and read it
                again with another adapter; it has to be started anew.
        """
        from vllm import SamplingParams

        prompts = prompt_rows(prompt_ids, prompt_mask)
        check_request(prompts, max_new_tokens, temperature, self.llm.model_config.max_model_len)
        self._wake()
        settings = [
            SamplingParams(
                temperature=temperature,
                max_tokens=max_new_tokens,
                seed=own_seed,
                stop_token_ids=[self.tokenizer.eos_token_id],  # vLLM adds those of generation_config.json
                logprobs=0,  # of the drawn token and no other
                flat_logprobs=True,
                detokenize=False,
            )
            for own_seed in row_seeds(len(prompts), seed, first_row)
        ]
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        done = self.llm.generate(requests, settings, lora_request=self._lora, use_tqdm=False)
        if self._sleeps:
            self.llm.sleep(level=1)
            self._asleep = True
        answers = [request.outputs[0] for request in done]
        return rollouts_of(
            self.tokenizer,
            prompt_ids,
            prompt_mask,
            [answer.token_ids for answer in answers],
            [answer.logprobs.logprobs for answer in answers],
            [answer.finish_reason == "length" for answer in answers],
        )

    def _swap(self, adapter: TinyLoraAdapter | None) -> None:
        from vllm.lora.request import LoRARequest

        before, folder, lora = self._lora, None, None
        if adapter is not None:
            check_rank(adapter, self.room)
            folder = tempfile.TemporaryDirectory(prefix="tinylora-")
            self._count += 1  # vLLM takes a number that it has seen for a LoRA that it has
            path = export_lora(adapter, Path(folder.name) / "lora")
            lora = LoRARequest(f"tinylora-{self._count}", self._count, str(path))
            self.llm.llm_engine.add_lora(lora)
        if before is not None:
            self.llm.llm_engine.remove_lora(before.lora_int_id)
        self._lora, self._folder = lora, folder

    def _push(self, adapter: TinyLoraAdapter | None) -> None:
        before, config = self._pushed, self.llm.model_config
        if adapter is None and before is None:
            return
        names = () if adapter is None else adapter.names
        stale = () if before is None else tuple(name for name in before.names if name not in names)
        if _on_cpu():
            weights = dict(_model_of(adapter or before).state_dict())
            weights |= {} if adapter is None else dict(merged_weights(adapter, config.dtype))
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": list(weights.items())})
            self._pushed = adapter
            return
        for name in stale:
            self._load(f"{name}.weight", dense_weight(_model_of(before).get_submodule(name)).to(config.dtype))
        self._pushed = adapter
        if adapter is not None:
            for name, weight in merged_weights(adapter, config.dtype):
                self._load(name, weight)

    def _load(self, name: str, weight: Tensor) -> None:
        alone = self.llm.llm_engine.vllm_config.parallel_config.world_size == 1
        # Other processes get it through a pipe, and they have other devices.
        self.llm.collective_rpc(_load_weight, args=(name, weight if alone else weight.cpu()))

    def _wake(self) -> None:
        if self._asleep:
            self.llm.wake_up()
            self._asleep = False


def _load_weight(worker: Any, name: str, weight: Tensor) -> None:
    """Runs in every worker; vLLM's loader finds the place inside ``qkv_proj`` and ``gate_up_proj``."""
    worker.get_model().load_weights([(name, weight)])


def _on_cpu() -> bool:
    """Whether vLLM computes on the CPU; its layers then keep weights in an order of their own, and not one by one."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def _model_of(adapter: TinyLoraAdapter | None) -> nn.Module:
    model = None if adapter is None else adapter._model()
    if model is None:
        raise ValueError("the adapter's model no longer exists, and the base's weights with it; make a new sampler")
    return model


def _vllm() -> Any:
    try:
        import vllm
    except ImportError as error:
        raise ImportError('sampling with vLLM needs vLLM: pip install "tinylora_lite[vllm]"') from error
    return vllm


@contextmanager
def _no_word_of_templates() -> Iterator[None]:
    """Inside, vLLM does not report, with a traceback, that it has no tokenizer to try a chat template with."""
    logger = logging.getLogger("vllm.renderers.base")

    def grave(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    logger.addFilter(grave)  # a level would be set back, as vLLM configures its logging here
    try:
        yield
    finally:
        logger.removeFilter(grave)


@contextmanager
def _in_this_process() -> Iterator[None]:
    """Engines that are made inside run in this process, where weights change hands without a copy."""
    name = "VLLM_ENABLE_V1_MULTIPROCESSING"
    before, shown = os.environ.get(name), sys.stdout
    os.environ[name] = "0"
    try:
        shown.fileno()
    except (AttributeError, OSError):  # a notebook's, as in Colab; vLLM asks it for a file descriptor
        sys.stdout = sys.__stdout__
    try:
        yield
    finally:
        sys.stdout = shown
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
