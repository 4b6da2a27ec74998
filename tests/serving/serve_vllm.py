"""Run by the Python that has vLLM: serves one model, with LoRAs or without, and writes what it answered.

    python serve_vllm.py JOB.json ANSWERS.json

A process of its own, since vLLM binds threads to cores and replaces functions of torch. Prompts are token ids, because
what is compared is the model; and nothing of this library is imported, because a server has no reason to.
"""

import json
import sys
import time
from pathlib import Path


def main(job_path: str, answers_path: str) -> None:
    job = json.loads(Path(job_path).read_text(encoding="utf-8"))

    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    loras = {name: LoRARequest(name, number, path) for number, (name, path) in enumerate(job["loras"].items(), 1)}
    # On a CPU, vLLM gives a request without a LoRA the LoRA of the last slot where one with a LoRA is in the same batch
    # (its pull request 48421). One slot more than there are LoRAs stays empty, and an empty one adds nothing.
    lora_settings = {"enable_lora": True, "max_lora_rank": 8, "max_loras": len(loras) + 1} if loras else {}
    llm = LLM(
        model=job["model"],
        dtype="float32",
        skip_tokenizer_init=True,
        max_model_len=job["max_model_len"],
        enforce_eager=True,
        kv_cache_memory_bytes=64 * 2**20,
        **lora_settings,
    )
    seconds = time.time() - job["started"]

    greedy = SamplingParams(
        temperature=0, max_tokens=job["max_tokens"], stop_token_ids=job["ends"], logprobs=0, detokenize=False
    )
    read_only = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    # All in one call, so that requests for the base and for every LoRA share batches.
    requests = [
        ({"prompt_token_ids": prompt + forced}, read_only if forced else greedy, loras.get(lora))
        for lora, prompt, forced in job["requests"]
    ]
    prompts, sampling, chosen = (list(column) for column in zip(*requests, strict=True))
    outputs = llm.generate(prompts, sampling, lora_request=chosen if loras else None, use_tqdm=False)

    answers = []
    for (_, prompt, forced), output in zip(job["requests"], outputs, strict=True):
        tokens = forced or list(output.outputs[0].token_ids)
        table = output.prompt_logprobs[len(prompt) :] if forced else output.outputs[0].logprobs
        logprobs = [row[token].logprob for row, token in zip(table, tokens, strict=True)]
        answers.append({"tokens": tokens, "logprobs": logprobs})
    result = {"seconds": seconds, "answers": answers}
    Path(answers_path).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
