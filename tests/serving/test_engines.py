"""One settings file by each loop with vLLM's samples, from the command line: the numbers learn what they learn here."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tinylora_lite import nano
from tinylora_lite.cli import main

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif("VLLM_PYTHON" not in os.environ, reason="needs vLLM: run `make test-vllm`"),
]

ROOT = Path(__file__).parents[2]
BASIS = nano.basis_file()
SETTINGS = {
    "model": "nano",
    "task": "nano",
    "dtype": "float32",
    "adapter": {"rank": 8, "u": 13, "n_tie": "all", "projection": str(BASIS)},
    "training": {
        "steps": 12,
        "prompts_per_step": 16,
        "group_size": 8,
        "max_new_tokens": nano.MAX_NEW_TOKENS,
        "learning_rate": 0.2,
    },
    "evaluation": {"tasks": ["nano"], "problems": 200, "temperature": 1.0, "max_new_tokens": nano.MAX_NEW_TOKENS},
}


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("engines") / "settings.yaml"
    path.write_text(json.dumps(SETTINGS), encoding="utf-8")  # JSON is YAML, too
    return path


@pytest.fixture(scope="module")
def plain(file) -> float:
    """What our loop reaches with the model's own samples."""
    folder = file.parent / "plain"
    assert main(["train", str(file), f"folder={folder}", "--json"]) == 0
    return json.loads((folder / "outcome.json").read_text())["trained"]["nano"]["accuracy"]


@pytest.mark.parametrize(
    ("trainer", "sync"), [("own", "lora"), ("own", "merged"), ("trl", "lora"), ("trl", "merged")], ids=" ".join
)
def test_the_file_trains(trainer, sync, file, plain):
    folder = file.parent / f"{trainer}-{sync}"
    settings = ["sampler.engine=vllm", f"sampler.sync={sync}", f"trainer={trainer}", f"folder={folder}"]
    quiet = {"DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "PYTHONPATH": str(ROOT)}
    command = [os.environ["VLLM_PYTHON"], "-m", "tinylora_lite", "train", str(file), *settings, "--json"]
    done = subprocess.run(
        command, env=os.environ | quiet, cwd=file.parent, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    base, trained = found["base"]["nano"], found["trained"]["nano"]
    run = json.loads((folder / "run.json").read_text())
    print(f"{trainer}, {sync}: {base['accuracy']:.1%} -> {trained['accuracy']:.1%} in {run['seconds']:.0f} s")
    assert trained["low"] > base["high"] + 0.2
    # Seeds of this run end within 0.1 of one another, and the interval of 200 problems adds as much.
    assert abs(trained["accuracy"] - plain) < 0.2
    assert max(step["logprob_diff_mean"] for step in run["steps"]) < 1e-4, (
        "vLLM answered with other numbers than the trainer's"
    )
