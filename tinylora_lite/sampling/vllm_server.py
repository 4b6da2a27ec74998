"""vLLM's own server as the sampler: on other GPUs, with tensor parallelism, shared by the processes that train.

The server runs beside training, on this machine or another one, started by :func:`serve_command`. At every step the
adapter is written as a LoRA into a folder that both can read, and the server is told to load it. Nothing of this
library runs there.
"""

from __future__ import annotations

import json
import math
import shlex
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

from torch import Tensor

from tinylora_lite.files.lora import export_lora
from tinylora_lite.sampling.rollouts import Rollouts
from tinylora_lite.sampling.vllm_answers import (
    NOT_FINITE,
    check_ends,
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

PLAIN = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
"""The distribution as the model has it: a checkpoint's generation_config.json may ask the server for another one."""


def serve_command(
    model: str | Path,
    adapter_rank: int = 8,
    tensor_parallel: int = 1,
    port: int = 8000,
    *,
    host: str = "127.0.0.1",
    python: str = "python",
    **options: str | int | float | bool,
) -> list[str]:
    """The command that starts a server for :class:`VllmServerSampler`, in words for a shell or ``subprocess``.

    Whoever reaches the port may have the server load LoRAs from its disk, so it listens to this machine alone unless
    another ``host`` is named.

    Args:
        model: a checkpoint's folder, or its name on the hub.
        adapter_rank: the largest rank of an adapter that will come.
        tensor_parallel: GPUs that share every layer.
        port: where it listens.
        host: on which address.
        python: the Python that has vLLM.
        options: further options of vLLM's server: ``max_model_len=4096`` for ``--max-model-len 4096``,
            ``enforce_eager=True`` for ``--enforce-eager``, ``False`` for the same with ``no-`` before. On a CPU
            ``enable_chunked_prefill=False`` is needed: a prompt that vLLM reads in parts ends its CPU build otherwise.

    >>> " ".join(serve_command("Qwen/Qwen2.5-7B-Instruct", 2, 4, max_model_len=4096)[-6:])
    '--tensor-parallel-size 4 --port 8000 --max-model-len 4096'
    """
    command = ["env", "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1", python, "-m", "vllm.entrypoints.openai.api_server"]
    # Two LoRAs have room: the one that answers and its successor.
    command += ["--model", str(model), "--host", host, "--skip-tokenizer-init", "--enable-lora", "--max-loras", "2"]
    command += ["--max-lora-rank", str(room_for(adapter_rank)), "--logprobs-mode", "processed_logprobs"]
    command += ["--tensor-parallel-size", str(tensor_parallel), "--port", str(port)]
    for name, value in options.items():
        flag = name.replace("_", "-")
        command += [f"--no-{flag}" if value is False else f"--{flag}"] + (
            [] if isinstance(value, bool) else [str(value)]
        )
    return command


class VllmServerSampler:
    """A vLLM server that answers with the adapter as it was at the last :meth:`sync`; before the first, with the base.

    Where several processes train (``torch.distributed``), each has a sampler of its own, and all of them call
    :meth:`sync` together: the first process loads the adapter, and the others follow.

    Args:
        url: of the server, for example ``http://127.0.0.1:8000``.
        tokenizer: the trainer's. The server is given token ids and needs none.
        model: the base that the server must serve, by the folder or name it was started with; ``None`` takes any.
        folder: where LoRAs are written for the server to read, at the same path on its machine; ``None`` takes the
            folder for temporary files, which suits a server on this machine.
        api_key: of the server, where it was started with one.
        wait: seconds that the server may take to start, or to come back.
        timeout: seconds that one answer may take.
        connections: prompts that are asked at once.

    Raises:
        ConnectionError: no server answers.
        ValueError: it serves another model, or the tokenizer has no end or pad token.
    """

    def __init__(
        self,
        url: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        model: str | Path | None = None,
        folder: str | Path | None = None,
        api_key: str | None = None,
        wait: float = 60.0,
        timeout: float = 3600.0,
        connections: int = 256,
    ) -> None:
        check_ends(tokenizer)
        self.url, self.tokenizer, self.wait, self.timeout = url.rstrip("/"), tokenizer, wait, timeout
        self.folder, self.connections = None if folder is None else Path(folder).resolve(), connections
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        # Straight to the server: a proxy that the environment names is a way out of the cluster.
        self._open = build_opener(ProxyHandler({})).open
        served = [card for card in json.loads(self._ask("/v1/models"))["data"] if card.get("parent") is None]
        if model is not None and not any(str(model) in (card["id"], card.get("root")) for card in served):
            names = ", ".join(str(card["id"]) for card in served)
            raise ValueError(f"the server at {self.url} serves {names}, not {model}; start one that does")
        self.base = str(served[0]["id"])
        self.limit = int(served[0].get("max_model_len") or 2**31)
        self._name: str | None = None  # of the LoRA that answers
        self._written: tempfile.TemporaryDirectory[str] | None = None  # where it lies, in the process that wrote it
        self._scaled = False  # whether the server is known to report probabilities at the temperature of the draw

    def sync(self, adapter: TinyLoraAdapter | None) -> None:
        """From now on samples come from the base with ``adapter`` as it is now, or from the base alone (``None``).

        Raises:
            ConnectionError: the server no longer answers.
            ValueError: it was not started for LoRAs at run time, has no room for the adapter's rank, cannot read the
                folder or refuses the LoRA for another reason; or the adapter's numbers are not finite.
        """
        before, written = self._name, self._written
        self._name = _from_the_first(lambda: None if adapter is None else self._load(adapter))
        if written is not None:
            with suppress(_RefusedError):  # a server that was started again knows nothing of it
                self._ask("/v1/unload_lora_adapter", {"lora_name": before})
            written.cleanup()
            self._written = None if self._written is written else self._written

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
            ConnectionError: the server does not answer, or not in time.
            ValueError: ``max_new_tokens`` is below 1, ``temperature`` below 0, a prompt and its completion could exceed
                the server's ``max_model_len``, or the server reports probabilities at another temperature.
            FloatingPointError: the model puts out NaN or infinity. vLLM on a CPU may keep it in its cache, and read it
                again with another adapter; it has to be started anew.
        """
        prompts = prompt_rows(prompt_ids, prompt_mask)
        check_request(prompts, max_new_tokens, temperature, self.limit)
        if temperature not in (0.0, 1.0):
            self._check_scaled(prompts[0])
        fixed = {"max_tokens": max_new_tokens, "temperature": temperature, "logprobs": 0}
        seeds = row_seeds(len(prompts), seed, first_row)
        asked = [{"prompt": prompt, "seed": own} | fixed for prompt, own in zip(prompts, seeds, strict=True)]
        with ThreadPoolExecutor(min(self.connections, len(asked))) as pool:
            waiting = [pool.submit(self._complete, request) for request in asked]
            try:
                answers = [answer.result() for answer in waiting]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return rollouts_of(
            self.tokenizer,
            prompt_ids,
            prompt_mask,
            [answer["token_ids"] for answer in answers],
            # JSON has no NaN, and null stands for it.
            [[math.nan if p is None else p for p in answer["logprobs"]["token_logprobs"]] for answer in answers],
            [answer["finish_reason"] == "length" for answer in answers],
        )

    def _load(self, adapter: TinyLoraAdapter) -> str:
        """Has the server load the adapter as it is now, under a name that it never had before."""
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        written = tempfile.TemporaryDirectory(prefix="tinylora-", dir=self.folder)
        Path(written.name).chmod(0o755)  # the server may run as someone else
        name, rank = Path(written.name).name, adapter.config.rank
        path = export_lora(adapter, Path(written.name) / "lora")
        try:
            self._ask("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path)})
        except _RefusedError as refused:
            if "greater than max_lora_rank" in refused.reason:
                cure = f"the adapter is of rank {rank}; start it with --max-lora-rank {room_for(rank)}"
            elif "LoRA is not enabled" in refused.reason or (refused.code == 404 and not refused.reason):
                cure = (
                    f"it was not started for LoRAs at run time; start it with: {shlex.join(serve_command(self.base))}"
                )
            elif refused.code == 404:
                cure = f"it cannot read {path}; name a folder that both machines see, at the same path"
            else:
                cure = refused.reason
            raise ValueError(f"the server at {self.url} did not load the adapter: {cure}") from refused
        self._written = written
        return name

    def _complete(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to one request."""
        fixed = {"return_token_ids": True, "return_tokens_as_token_ids": True}
        stop = {"stop_token_ids": [self.tokenizer.eos_token_id]}  # vLLM adds those of generation_config.json
        body = {"model": self._name or self.base} | PLAIN | fixed | stop | request
        try:
            return dict(json.loads(self._ask("/v1/completions", body))["choices"][0])
        except _RefusedError as refused:
            if "float values are not JSON compliant" in refused.reason:
                raise FloatingPointError(NOT_FINITE) from refused
            raise ValueError(f"the server at {self.url} refused to answer: {refused.reason}") from refused

    def _check_scaled(self, prompt: list[int]) -> None:
        """Raises ``ValueError`` where temperature leaves the probabilities as they are that the server reports."""
        if self._scaled:
            return
        likeliest = []
        for temperature in (0.01, 2.0):  # the range that the server takes
            answer = self._complete({"prompt": prompt, "max_tokens": 1, "temperature": temperature, "logprobs": 1})
            likeliest.append(max(answer["logprobs"]["top_logprobs"][0].values()))
        cold, hot = likeliest
        self._scaled = not math.isclose(cold, hot, abs_tol=1e-4)
        if not self._scaled and cold < -0.01:  # nearer to certainty, both may be equal by right
            raise ValueError(
                f"the server at {self.url} reports probabilities at temperature 1, whatever is asked for; start it "
                "with --logprobs-mode processed_logprobs"
            )

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> str:
        """What the server answers; for as long as ``wait`` allows, one that is not there is asked again."""
        data = None if body is None else json.dumps(body).encode()
        until = time.monotonic() + self.wait
        while True:
            try:
                with self._open(Request(self.url + path, data, self._headers), timeout=self.timeout) as answer:
                    return str(answer.read().decode())
            except HTTPError as error:
                if error.code != 503:  # which says: not yet
                    raise _RefusedError(error.code, _reason(error.read())) from error
                failure: Exception = error
            except TimeoutError as error:
                raise ConnectionError(f"the server at {self.url} took longer than {self.timeout} seconds") from error
            except (OSError, HTTPException) as error:
                failure = error
            if time.monotonic() > until:
                raise ConnectionError(
                    f"no vLLM server answers at {self.url} ({failure}); serve_command says how to start one"
                ) from failure
            time.sleep(0.2)


class _RefusedError(Exception):
    """The server answered with an error: its HTTP status, and its reason where it gave one."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{code}: {reason}")
        self.code, self.reason = code, reason


def _reason(answer: bytes) -> str:
    """What vLLM says is wrong; nothing where it is the web server below it that does not know the path."""
    try:
        found = json.loads(answer)
    except ValueError:
        return answer.decode(errors="replace").strip()
    return str(found["error"]["message"]) if isinstance(found, dict) and "error" in found else ""


def _from_the_first(make: Callable[[], str | None]) -> str | None:
    """What the first of the processes that train makes, in all of them; what it raises, too."""
    distributed.barrier()  # until no one samples any more from what is about to go
    made: str | Exception | None = None
    if distributed.rank() == 0:
        try:
            made = make()
        except (ConnectionError, ValueError) as error:
            if distributed.world_size() == 1:
                raise
            made = error
    made = distributed.all_gather_object(made)[0]
    if isinstance(made, Exception):
        raise made
    return made
