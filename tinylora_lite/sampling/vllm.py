"""vLLM as the sampler, in the process that trains: the adapter follows as a LoRA, or inside the weights.

As a LoRA of rank r, which ``(U Σ) R Vᵀ`` is, vLLM computes it beside the base, as the trainer does: an update of any
size survives, and a few megabytes are handed over at each step. Merged, as in the paper, every adapted weight is
pushed, and rounding to the engine's dtype removes small updates (:func:`~tinylora_lite.merge_report`), which truncated
importance sampling has to correct. Both start from the pristine base at every step, so no rounding accumulates.
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

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tinylora_lite.adapter.weights import dense_weight
from tinylora_lite.files.file_format import model_of
from tinylora_lite.files.lora import export_lora
from tinylora_lite.files.merge import merged_weights
from tinylora_lite.sampling.policy import check_tokenizer
from tinylora_lite.sampling.rollouts import Rollouts, padded
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

    tokens: list[int]
    logprobs: Sequence[float | None]  # None is JSON's for NaN
    truncated: bool


class VllmEngine(ABC):
    """What an engine in this process and a server share: requests from prompts, and rollouts from answers."""

    limit: int
    """Tokens of the longest prompt and completion together."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        check_tokenizer(tokenizer)
        self.tokenizer = tokenizer  # the trainer's; vLLM itself is given token ids and needs none

    @abstractmethod
    def _answer(self, prompts: list[list[int]], seeds: list[int], settings: dict[str, Any]) -> list[Answer]:
        """One answer for each prompt and seed; settings as vLLM names them."""

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
            ValueError: vLLM refuses a setting, a prompt and its completion could exceed ``max_model_len``, or a server
                reports probabilities at another temperature.
            ConnectionError: a server does not answer, or not in time.
            FloatingPointError: the model puts out NaN or infinity. vLLM on a CPU may keep it in its cache, and read it
                again with another adapter; it has to be started anew.
        """
        prompts = [ids[mask.bool()].tolist() for ids, mask in zip(prompt_ids.cpu(), prompt_mask.cpu(), strict=True)]
        longest = max(map(len, prompts))
        if longest + max_new_tokens > self.limit:
            raise ValueError(
                f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed vLLM's max_model_len of "
                f"{self.limit}; ask for fewer, or start it with more"
            )
        seeds = [seed_of("row", seed, first_row + row) for row in range(len(prompts))]
        settings: dict[str, Any] = {"max_tokens": max_new_tokens, "temperature": temperature}
        settings |= {"logprobs": 0}  # of the drawn token and no other
        settings |= {"stop_token_ids": [self.tokenizer.eos_token_id]}  # vLLM adds those of generation_config.json
        answers = self._answer(prompts, seeds, settings)
        rows, device = [answer.tokens for answer in answers], prompt_ids.device
        ids, mask = padded(rows, self.tokenizer, "right", device)
        logprobs = [torch.from_numpy(np.array(answer.logprobs, np.float32)) for answer in answers]
        drawn = pad_sequence(logprobs, batch_first=True).to(device)
        if not drawn.isfinite().all():
            raise FloatingPointError(NOT_FINITE)
        cut = torch.tensor([answer.truncated for answer in answers], device=device)
        texts = [text.strip() for text in self.tokenizer.batch_decode(rows, skip_special_tokens=True)]
        return Rollouts(prompt_ids, prompt_mask, ids, mask, drawn, -drawn, cut, texts)


class VllmSampler(VllmEngine):
    """A vLLM engine that answers with the adapter as it was at the last :meth:`sync`; before the first, with the base.

    On a GPU that the trainer uses too, load the trainer's model first, then the engine. Its share of the GPU includes
    its copy of the weights; the rest must hold the trainer's activations and logits. Several training processes share
    a server instead (:class:`~tinylora_lite.sampling.vllm_server.VllmServerSampler`).

    Args:
        model: a checkpoint's folder, or its name on the hub: the base that the adapter was made for.
        tokenizer: the trainer's.
        sync: ``"lora"`` or ``"merged"``; see the head of this module.
        max_lora_rank: the largest rank of an adapter to come.
        engine: arguments of ``vllm.LLM``, such as ``max_model_len`` (tokens of the longest prompt and completion
            together), ``dtype`` (LoRAs are rounded to it, which costs less than 1 % of the update in bfloat16),
            ``tensor_parallel_size`` or ``gpu_memory_utilization`` (the share of the whole GPU, 0.3 by default). On a
            CPU, ``enforce_eager`` is on, and keys and values get 1 GiB.

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
        max_lora_rank: int = 8,
        **engine: Any,
    ) -> None:
        super().__init__(tokenizer)
        if sync not in get_args(Sync):
            raise ValueError(f"sync must be one of {', '.join(get_args(Sync))}, not {sync!r}")
        if distributed.world_size() > 1:
            raise ValueError("several processes train, and an engine lives in one; share a server: VllmServerSampler")
        try:
            import vllm
        except ImportError as error:
            raise ImportError('sampling with vLLM needs vLLM: pip install "tinylora_lite[vllm]"') from error
        settings = engine_settings(model, max_lora_rank if sync == "lora" else None)
        settings |= {"gpu_memory_utilization": 0.3, "enforce_eager": _on_cpu()}
        if _on_cpu():
            # Where a prompt is read in chunks, vLLM rewinds the row's generator, which no CPU generator can.
            settings |= {"kv_cache_memory_bytes": 2**30, "enable_chunked_prefill": False}
        # It would warn, with a traceback, that it has no tokenizer to try a chat template with.
        logging.getLogger("vllm.renderers.base").setLevel(logging.ERROR)
        # The engine seeds torch's own generators, which are the trainer's.
        with _in_this_process(), torch.random.fork_rng():
            self.llm = vllm.LLM(**settings | engine)
        if sync == "merged" and self.llm.model_config.quantization is not None:
            raise ValueError("weights cannot be merged into a quantized engine; use sync='lora'")
        self.mode, self.limit = sync, self.llm.model_config.max_model_len
        self._folder = tempfile.TemporaryDirectory(prefix="tinylora-")
        self._lora: Any = None  # the LoRARequest that answers
        self._pushed: TinyLoraAdapter | None = None  # the last adapter that was merged

    def sync(self, adapter: TinyLoraAdapter | None) -> None:
        """From now on samples come from the base with ``adapter`` as it is now, or from the base alone (``None``).

        Raises:
            ValueError: the adapter's rank is above ``max_lora_rank``, its model is gone, or its parameters are not
                finite.
        """
        if self.mode == "merged":
            self._push(adapter)
        elif adapter is None:
            self._lora = None
        else:
            from vllm.lora.request import LoRARequest

            path = str(export_lora(adapter, Path(self._folder.name) / "lora"))
            self.llm.llm_engine.add_lora(LoRARequest("tinylora", 1, path, load_inplace=True))
            self._lora = LoRARequest("tinylora", 1, path)
        # Cached prompts have keys and values of the weights before.
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM's prefix cache is in use and holds keys and values of other weights")

    def _answer(self, prompts: list[list[int]], seeds: list[int], settings: dict[str, Any]) -> list[Answer]:
        from vllm import SamplingParams

        settings |= {"flat_logprobs": True, "detokenize": False}
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        each = [SamplingParams(seed=seed, **settings) for seed in seeds]
        done = self.llm.generate(requests, each, lora_request=self._lora, use_tqdm=False)
        outputs = [request.outputs[0] for request in done]
        return [Answer([*one.token_ids], one.logprobs.logprobs, one.finish_reason == "length") for one in outputs]

    def _push(self, adapter: TinyLoraAdapter | None) -> None:
        latest = adapter or self._pushed
        if latest is None:
            return
        model, dtype = model_of(latest), self.llm.model_config.dtype
        merged = merged_weights(adapter, dtype) if adapter else iter(())
        before, now = (set(each.names if each else ()) for each in (self._pushed, adapter))
        self._pushed = adapter  # even where not all of its weights arrive
        if _on_cpu():
            # While another engine trains the adapter, PEFT keeps its LoRA and each layer inside a layer of its own.
            kept = {n.replace(".base_layer.", "."): w for n, w in model.state_dict().items() if ".lora_" not in n}
            weights = list((kept | dict(merged)).items())
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
            return
        pristine = ((f"{name}.weight", dense_weight(model.get_submodule(name)).to(dtype)) for name in before - now)
        alone = self.llm.llm_engine.vllm_config.parallel_config.world_size == 1
        for name, weight in chain(pristine, merged):
            # Other processes get it through a pipe, and they have other devices.
            self.llm.collective_rpc(_load_weight, args=(name, weight if alone else weight.cpu()))


def engine_settings(model: str | Path, lora_rank: int | None) -> dict[str, Any]:
    """Settings of engine and server alike; ``None`` takes no LoRAs. Raises ``ValueError`` for a rank out of range."""
    settings: dict[str, Any] = {"model": str(model), "skip_tokenizer_init": True}
    settings["logprobs_mode"] = "processed_logprobs"  # at the temperature of the draw; raw ones would be at 1
    if lora_rank is None:
        return settings
    if not 1 <= lora_rank <= RANKS[-1]:
        raise ValueError(f"vLLM serves LoRAs of rank 1 to {RANKS[-1]}, not {lora_rank}; push merged weights instead")
    return settings | {"enable_lora": True, "max_lora_rank": min(rank for rank in RANKS if rank >= lora_rank)}


def _load_weight(worker: Any, name: str, weight: Tensor) -> None:
    """Runs in every worker; vLLM's loader finds the place inside ``qkv_proj`` and ``gate_up_proj``."""
    worker.get_model().load_weights([(name, weight)])


def _on_cpu() -> bool:
    """Whether vLLM computes on the CPU; its layers then reorder their weights, and cannot load a single one."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


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
