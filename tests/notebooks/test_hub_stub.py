"""The 7B chapter's code, unchanged, on a hub that is a folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pyarrow")

import hub_stub

SHORTER = [
    *("training.steps=1", "training.prompts_per_step=2", "training.group_size=2", "training.max_new_tokens=16"),
    *("evaluation.problems=4", "evaluation.max_new_tokens=16", "sampler.engine=transformers"),
]
"""A CPU has no vLLM here and no hours; model, data, prompts and adapter are the chapter's own."""

LOAD = """
import json
from pathlib import Path
from huggingface_hub import try_to_load_from_cache
from transformers.utils import logging
from tinylora_lite.experiment.models import load_model, load_tokenizer
from tinylora_lite.tasks.datasets import load_task
from tinylora_lite.sampling.rollouts import encode_prompts

logging.disable_progress_bar()
model, tokenizer = load_model("Qwen/Qwen2.5-7B-Instruct"), load_tokenizer("Qwen/Qwen2.5-7B-Instruct")
task = load_task("gsm8k")
ids, mask = encode_prompts(tokenizer, task, task.train[:2])
text = "It's 123 eggs,\\n\\n na\\u00efve  \\u4f60\\u597d\\t<|im_end|>"
print(json.dumps({
    "layers": model.config.num_hidden_layers,
    "width": model.config.hidden_size,
    "dtype": str(model.dtype),
    "commit": Path(try_to_load_from_cache("Qwen/Qwen2.5-7B-Instruct", "config.json")).parent.name,
    "round_trip": tokenizer.decode(tokenizer(text).input_ids) == text,
    "digits": [tokenizer.decode(i) for i in tokenizer("123").input_ids],
    "special": [tokenizer.eos_token, tokenizer.pad_token],
    "prompt": tokenizer.decode(ids[0][mask[0].bool()]),
    "sizes": [len(task.train), len(task.validation), len(task.test)],
    "ends": model.generation_config.eos_token_id,
}))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("hub")
    hub_stub.make_hub(home)
    return home


def test_the_model_s_name_resolves_to_the_stub(hub):
    environment = os.environ | {"HF_HOME": str(hub), "HF_HUB_OFFLINE": "1"}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", LOAD], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["layers"], found["width"], found["dtype"]) == (2, 896, "torch.bfloat16")
    assert found["commit"] == hub_stub.COMMIT
    assert found["round_trip"]
    assert found["digits"] == ["1", "2", "3"]
    assert found["special"] == ["<|im_end|>", "<|endoftext|>"]
    assert len(found["ends"]) == 2
    assert found["sizes"] == [6973, 500, 1319]
    system, user, end = found["prompt"].split("<|im_start|>")[1:]
    assert system == f"system\n{hub_stub.DEFAULT_SYSTEM}<|im_end|>\n"
    assert user.startswith("user\n")
    assert user.endswith('output the final answer after "####".<|im_end|>\n')
    assert end == "assistant\n"


def check(run_notebook, hub: Path, folder: Path, layers: int, overrides: list[str], **environment: str) -> None:
    overrides = [*SHORTER, *overrides, f"folder={folder}"]
    book = run_notebook("gpu_07_gsm8k.ipynb", overrides, HF_HOME=str(hub), **environment)
    outcome, run = (json.loads((folder / name).read_text()) for name in ("outcome.json", "run.json"))
    assert outcome["model"] == hub_stub.MODEL
    assert f"revision: {hub_stub.COMMIT}" in (folder / "settings.yaml").read_text()
    assert outcome["parameters"] == -(-7 * layers // 16), "n_tie = 16, as on the 7B model"
    assert outcome["base"]["gsm8k"]["n"] == 4
    assert len(run["steps"]) == 1
    last = book.cells[-1].outputs[-1]["data"]["text/markdown"]
    assert f"runs/{folder.name}" in last, "the run is in the table"
    assert "paper, arXiv v1" in last
    assert "not yet run" not in last


def test_the_7b_chapter_runs_unchanged(run_notebook, hub, tmp_path):
    check(run_notebook, hub, tmp_path / "run", layers=2, overrides=[])


@pytest.mark.slow
def test_the_7b_chapter_runs_unchanged_on_the_full_shape_of_the_half_billion_model(run_notebook, tmp_path):
    """In float32, since most CPUs emulate bfloat16, and with fewer tokens: each has 152 thousand logits."""
    hub_stub.make_hub(tmp_path / "hub", layers=24, vocabulary=151_936)
    fewer = ["dtype=float32", "training.max_new_tokens=6", "evaluation.max_new_tokens=6"]
    check(run_notebook, tmp_path / "hub", tmp_path / "run", layers=24, overrides=fewer, OMP_NUM_THREADS="2")
