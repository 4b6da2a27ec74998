"""vLLM's own server as the sampler: on other GPUs, with tensor parallelism, shared by the processes that train.

The server runs beside training, on this machine or another one, started by :func:`serve_command`. At every step the
adapter is written as a LoRA into a folder that both can read, and the server, which does not need this library, is told
to load it.
"""

from __future__ import annotations

import json
import math
import shlex
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

from tinylora_lite.files.lora import export_lora
from tinylora_lite.sampling.vllm import NOT_FINITE, Answer, VllmEngine, engine_settings
from tinylora_lite.utils import distributed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tinylora_lite.adapter.adapter import TinyLoraAdapter

CONNECTIONS = 256
"""Prompts that are sent at the same time."""
PLAIN = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
"""The model's own distribution: a checkpoint's generation_config.json may ask the server for another one."""


def serve_command(
    model: str | Path, adapter_rank: int = 8, *, python: str = "python", **options: str | int | float | bool
) -> list[str]:
    """The command that starts a server for :class:`VllmServerSampler`, as a list for ``subprocess``.

    Anyone who reaches the port can make the server load LoRAs from its disk, so it listens to this machine alone unless
    another ``host`` is named.

    Args:
        model: a checkpoint's folder, or its name on the hub.
        adapter_rank: the largest rank of an adapter to come.
        python: the Python that has vLLM.
        options: of vLLM's server: ``max_model_len=4096`` for ``--max-model-len 4096``, ``enforce_eager=True`` for
            ``--enforce-eager``, ``enforce_eager=False`` for ``--no-enforce-eager``. A CPU needs
            ``enable_chunked_prefill=False``: a prompt that vLLM reads in chunks ends its CPU build otherwise.

    >>> " ".join(serve_command("Qwen/Qwen2.5-7B-Instruct", 2, port=8001, tensor_parallel_size=4)[-6:])
    '--host 127.0.0.1 --port 8001 --tensor-parallel-size 4'
    """
    # Two LoRAs fit: the one that answers and its successor.
    settings = engine_settings(model, adapter_rank) | {"max_loras": 2, "host": "127.0.0.1"} | options
    command = ["env", "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1", python, "-m", "vllm.entrypoints.openai.api_server"]
    for name, value in settings.items():
        flag = name.replace("_", "-")
        command += [f"--no-{flag}" if value is False else f"--{flag}"]
        command += [] if isinstance(value, bool) else [str(value)]
    return command


class VllmServerSampler(VllmEngine):
    """A vLLM server that answers with the adapter as it was at the last :meth:`sync`; before the first, with the base.

    Where several processes train, each has a sampler, and all call :meth:`sync` together; the first loads the adapter.

    Args:
        url: of the server, for example ``http://127.0.0.1:8000``.
        tokenizer: the trainer's.
        model: the base that the server must serve, by the folder or name it was started with; ``None`` takes any.
        folder: where LoRAs are written for the server to read, at the same path on its machine; ``None`` takes the
            folder for temporary files, which suits a server on this machine.
        wait: seconds that the server may take to start, or to come back.
        timeout: seconds that one answer may take.

    Raises:
        ConnectionError: no server answers, or an answer takes longer than ``timeout``.
        ValueError: it serves another model, or the tokenizer lacks what sampling needs.
    """

    cure = "serve_command says how to start one"

    def __init__(
        self,
        url: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        model: str | Path | None = None,
        folder: str | Path | None = None,
        wait: float = 60.0,
        timeout: float = 3600.0,
    ) -> None:
        super().__init__(tokenizer)
        self.url, self.wait, self.timeout = url.rstrip("/"), wait, timeout
        self.folder = None if folder is None else Path(folder).resolve()
        # Without a proxy: one that the environment names leads out of the cluster.
        self._open = build_opener(ProxyHandler({})).open
        served = [card for card in json.loads(self._ask("/v1/models"))["data"] if card.get("parent") is None]
        if model is not None and not any(str(model) in (card["id"], card.get("root")) for card in served):
            names = ", ".join(str(card["id"]) for card in served)
            raise ValueError(f"the server at {self.url} serves {names}, not {model}; start one that does")
        self.base = str(served[0]["id"])
        self.limit = int(served[0].get("max_model_len") or 2**31)
        self._name: str | None = None  # of the LoRA that answers
        self._written: tempfile.TemporaryDirectory[str] | None = None  # its files, in the process that wrote them

    def sync(self, adapter: TinyLoraAdapter | None) -> None:
        """From now on samples come from the base with ``adapter`` as it is now, or from the base alone (``None``).

        Raises:
            ConnectionError: the server no longer answers.
            ValueError: it was not started for LoRAs at run time or for ones of such a rank, cannot read the folder or
                refuses the LoRA for another reason; or the adapter's parameters are not finite.
        """
        distributed.barrier()  # until no process samples from the LoRA that is about to go
        written: tempfile.TemporaryDirectory[str] | None = None
        found: str | Exception | None = None
        if adapter is not None and distributed.rank() == 0:
            try:
                written = self._load(adapter)
                found = Path(written.name).name
            except (ConnectionError, ValueError) as error:
                found = error
        found = distributed.all_gather_object(found)[0]
        if isinstance(found, Exception):
            raise found
        before, self._name, self._written = self._written, found, written
        if before is not None:
            with suppress(RefusedError, ConnectionError):  # a server that was started again does not know it
                self._ask("/v1/unload_lora_adapter", {"lora_name": Path(before.name).name})
            before.cleanup()

    def _load(self, adapter: TinyLoraAdapter) -> tempfile.TemporaryDirectory[str]:
        """Has the server load the adapter as it is now, under the name of a new folder."""
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        written = tempfile.TemporaryDirectory(prefix="tinylora-", dir=self.folder)
        Path(written.name).chmod(0o755)  # another user may run the server
        path = export_lora(adapter, Path(written.name) / "lora")
        try:
            self._ask("/v1/load_lora_adapter", {"lora_name": Path(written.name).name, "lora_path": str(path)})
        except RefusedError as refused:
            command = shlex.join(serve_command(self.base, adapter.config.rank))
            raise ValueError(f"{refused}; it must see {path}, and be started for such LoRAs: {command}") from refused
        return written

    def _answer(self, prompts: list[list[int]], seeds: list[int], settings: dict[str, Any]) -> list[Answer]:
        if settings["temperature"] not in (0.0, 1.0):
            self._check_scaled(prompts[0])
        requests = [{"prompt": prompt, "seed": seed} | settings for prompt, seed in zip(prompts, seeds, strict=True)]
        with ThreadPoolExecutor(min(CONNECTIONS, len(requests))) as pool:
            answers = list(pool.map(self._complete, requests))
        return [
            Answer(answer["token_ids"], answer["logprobs"]["token_logprobs"], answer["finish_reason"] == "length")
            for answer in answers
        ]

    def _complete(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to one request."""
        body = {"model": self._name or self.base, "return_token_ids": True, "return_tokens_as_token_ids": True}
        try:
            return dict(json.loads(self._ask("/v1/completions", body | PLAIN | request))["choices"][0])
        except RefusedError as refused:
            if "float values are not JSON compliant" in str(refused):
                raise FloatingPointError(NOT_FINITE) from refused
            raise

    def _check_scaled(self, prompt: list[int]) -> None:
        """Raises ``ValueError`` where the server reports probabilities that do not depend on the temperature."""
        request = {"prompt": prompt, "max_tokens": 1, "logprobs": 1}
        answers = [self._complete(request | {"temperature": at}) for at in (0.01, 2.0)]  # the range that vLLM takes
        cold, hot = (max(answer["logprobs"]["top_logprobs"][0].values()) for answer in answers)
        # A token that is almost certain is so at both temperatures.
        if cold < -0.01 and math.isclose(cold, hot, abs_tol=1e-4):
            cure = "start it with --logprobs-mode processed_logprobs"
            raise ValueError(f"the server at {self.url} reports probabilities at temperature 1 alone; {cure}")

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> str:
        """The server's answer; one that is not there is asked again for ``wait`` seconds."""
        data = None if body is None else json.dumps(body).encode()
        until = time.monotonic() + self.wait
        while True:
            try:
                with self._open(
                    Request(self.url + path, data, {"Content-Type": "application/json"}), timeout=self.timeout
                ) as answer:
                    return str(answer.read().decode())
            except TimeoutError as error:  # it may be answering still, and would do the work twice
                raise ConnectionError(f"the server at {self.url} took longer than {self.timeout} seconds") from error
            except (OSError, HTTPException) as error:
                if isinstance(error, HTTPError) and error.code != 503:  # not ready yet
                    reason: Any = error
                    with suppress(ValueError, KeyError, TypeError):
                        reason = json.loads(error.read())["error"]["message"]
                    raise RefusedError(f"the server at {self.url} refused {path}: {reason}") from error
                if time.monotonic() > until:
                    raise ConnectionError(f"no server answers at {self.url} ({error}); {self.cure}") from error
            time.sleep(0.2)


class RefusedError(ValueError):
    """The server answered with an error."""
