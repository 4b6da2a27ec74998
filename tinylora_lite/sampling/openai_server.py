"""A server of OpenAI's protocol that somebody started with an adapter: vLLM, llama.cpp's, llama-cpp-python's.

It cannot be brought in step with an adapter in memory; what it answers can be compared with one
(:func:`~tinylora_lite.check_sampler` with ``plant=False``).
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tinylora_lite.sampling.vllm_server import PLAIN, RefusedError, VllmServerSampler

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tinylora_lite.adapter.adapter import TinyLoraAdapter


class OpenAISampler(VllmServerSampler):
    """``/v1/completions`` with log-probabilities, from the model of a name as it was loaded.

    vLLM and llama-server take prompts as token ids and name the tokens of answers by id. llama-cpp-python does neither:
    prompts go as text, and tokens are found by theirs. An answer ends before the first token whose text is not its own,
    such as a part of a character.

    Args:
        url: of the server, for example ``http://127.0.0.1:8080``.
        tokenizer: the trainer's.
        name: what requests name: with vLLM the LoRA. ``None`` takes the first model that the server lists.
        wait, timeout: as of :class:`VllmServerSampler`.
    """

    cure = "start it, or correct the URL"

    def __init__(
        self,
        url: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str | None = None,
        wait: float = 10.0,
        timeout: float = 600.0,
    ) -> None:
        super().__init__(url, tokenizer, wait=wait, timeout=timeout)
        self._name = name

    def sync(self, adapter: TinyLoraAdapter | None) -> None:
        """Raises ``ValueError``: the server keeps the adapter that it was started with."""
        raise ValueError(f"the server at {self.url} cannot follow an adapter; compare it with plant=False")

    def _complete(self, request: dict[str, Any]) -> dict[str, Any]:
        """One answer; raises ``ValueError`` where it has no log-probabilities, or tokens that cannot be told."""
        ids, body = request["prompt"], {"model": self._name or self.base, "repeat_penalty": 1.0} | PLAIN | request
        body |= {"return_token_ids": True, "return_tokens_as_token_ids": True}  # of vLLM
        body |= {"seed": request["seed"] % 2**31, "logprobs": 1}  # llama.cpp takes 32 bits, and reports none for 0
        try:
            found = json.loads(self._ask("/v1/completions", body))
        except RefusedError:
            text = self.tokenizer.decode(ids)
            if self.tokenizer(text, add_special_tokens=False)["input_ids"] != ids:
                raise
            found = json.loads(self._ask("/v1/completions", body | {"prompt": text}))
        read, answer = (found.get("usage") or {}).get("prompt_tokens", len(ids)), found["choices"][0]
        if read != len(ids):
            what = f"the server at {self.url} reads a prompt as {read} tokens, and not as {len(ids)}"
            raise ValueError(f"{what}; its tokenizer differs, or it puts a start token before a prompt that has one")
        table = answer.get("logprobs")
        if not table:
            raise ValueError(f"the server at {self.url} reports no log-probabilities; start it so that it does")
        tokens: list[int | None]
        if "content" in table:  # llama-server
            tokens, logprobs = ([each.get(key) for each in table["content"]] for key in ("id", "logprob"))
        else:
            tokens, logprobs = answer.get("token_ids"), table["token_logprobs"]
            tokens = tokens or [self._token(text) for text in table["tokens"]]
        known = tokens.index(None) if None in tokens else len(tokens)
        if known == 0:
            raise ValueError(
                f"the first token of an answer from {self.url} cannot be told by its text; try another seed"
            )
        kept = {"token_logprobs": logprobs[:known]}
        return {"token_ids": tokens[:known], "logprobs": kept, "finish_reason": answer["finish_reason"]}

    def _token(self, text: str) -> int | None:
        """The token that has this text alone, or ``None``."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids[0] if len(ids) == 1 and self.tokenizer.decode(ids) == text else None
