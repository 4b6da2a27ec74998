"""``tinylora train`` and ``tinylora serve``: from a file or a preset to a folder, and what goes wrong in one line."""

import json
from pathlib import Path

import pytest

from tinylora_lite import nano
from tinylora_lite.cli import main
from tinylora_lite.experiment.settings import RunSettings, load_settings

SMALL = [
    "training.steps=1",
    "training.prompts_per_step=4",
    "training.group_size=2",
    "evaluation.problems=8",
    f"evaluation.max_new_tokens={nano.MAX_NEW_TOKENS}",
]


@pytest.fixture
def file(tmp_path) -> Path:
    training = {"steps": 1, "prompts_per_step": 4, "group_size": 2, "max_new_tokens": nano.MAX_NEW_TOKENS}
    evaluation = {"tasks": ["nano"], "problems": 8, "max_new_tokens": nano.MAX_NEW_TOKENS}
    settings = {"model": "nano", "task": "nano", "dtype": "float32", "training": training, "evaluation": evaluation}
    return RunSettings.from_dict(settings | {"folder": str(tmp_path / "run")}).save(tmp_path / "settings.yaml")


def result(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_file_with_other_settings_and_another_seed(file, capsys, tmp_path):
    assert main(["train", str(file), "adapter.u=2", "adapter.n_tie=all", "--seed", "3", "--json"]) == 0
    found = result(capsys)
    assert found["parameters"] == 2
    assert found["base"]["nano"]["n"] == found["comparisons"]["nano"]["n"] == 8
    written = load_settings(tmp_path / "run" / "settings.yaml")
    assert (written.adapter.u, written.training["seed"]) == (2, 3)


def test_plain_lines_and_a_report(file, capsys):
    assert main(["train", str(file)]) == 0
    printed = capsys.readouterr()
    assert "testing: nano, base" in printed.err
    assert "grpo, rate 0.01: step 1 of 1" in printed.err
    assert "49 parameters" in printed.out


def test_a_preset(capsys, tmp_path):
    assert main(["train", "nano", *SMALL, f"folder={tmp_path}", "--json"]) == 0
    assert result(capsys)["model"] == "nano"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.yaml"], "no settings file at nowhere.yaml; `tinylora preset NAME > nowhere.yaml` writes one"),
        (["FILE", "adapter.rnak=3"], "unknown setting adapter.rnak; did you mean adapter.rank?"),
        (["FILE", "--gpu", "t4"], "--gpu chooses among presets; a settings file says everything itself"),
        (["no-such-preset"], "no-such-preset"),
        (["FILE", "model=nobody/has-this"], "HF_HUB_OFFLINE is set; unset it, run `hf download nobody/has-this`"),
        (["FILE", "sampler.engine=vllm-server"], "url names the server of engine vllm-server"),
    ],
)
def test_errors_are_one_line(file, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["train", *(str(file) if a == "FILE" else a for a in arguments)]) == 1
    *progress, last = capsys.readouterr().err.splitlines()
    assert message in last
    assert all(line.startswith("[") for line in progress), "an error is one line, after those of the progress"


def test_the_server_of_a_settings_file(file, capsys):
    assert main(["serve", str(file), "model=some/folder", "dtype=bfloat16", "--port", "8123", "--print"]) == 0
    words = capsys.readouterr().out.split()
    assert words[:2] == ["env", "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"]
    for option, value in [("--model", "some/folder"), ("--port", "8123"), ("--dtype", "bfloat16")]:
        assert words[words.index(option) + 1] == value
    assert int(words[words.index("--max-model-len") + 1]) == 1024 + nano.MAX_NEW_TOKENS
    assert main(["serve", str(file), "--json"]) == 0
    command = result(capsys)["command"]
    assert command[command.index("--model") + 1] == str(nano.CHECKPOINTS / nano.BASE)
    assert "--skip-tokenizer-init" in command, "vLLM would read the nano tokenizer as Qwen2's own"
