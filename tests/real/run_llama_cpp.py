"""What llama.cpp computes: ``run_llama_cpp.py REQUEST ANSWER``, run by the Python that has llama-cpp-python.

The request lists texts to tokenize, and runs: a model, a LoRA or null, token ids and how many of them are the prompt.
"""

import json
import sys

import numpy as np
from llama_cpp import GGML_TYPE_F32, Llama

asked = json.loads(open(sys.argv[1], encoding="utf-8").read())  # noqa: PTH123, SIM115
answer = {}
for place, run in enumerate(asked["runs"]):
    llama = Llama(
        run["model"],
        lora_path=run["lora"],
        n_ctx=256,
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        type_k=GGML_TYPE_F32,  # half precision would hide what the weights do
        type_v=GGML_TYPE_F32,
        verbose=False,
    )
    llama.eval(run["ids"])
    answer[f"logits.{place}"] = np.array(llama.scores[: len(run["ids"])])
    llama.reset()
    llama.eval(run["ids"][: run["prompt"]])
    greedy = []
    while len(greedy) < len(run["ids"]) - run["prompt"]:
        greedy.append(int(np.argmax(llama.scores[llama.n_tokens - 1])))
        llama.eval(greedy[-1:])
    answer[f"greedy.{place}"] = np.array(greedy)
    if place == 0:
        for index, text in enumerate(asked["texts"]):
            answer[f"tokens.{index}"] = np.array(llama.tokenize(text.encode(), add_bos=False, special=True), int)
np.savez(sys.argv[2], **answer)
