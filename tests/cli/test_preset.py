"""tinylora preset: the list, a settings file that loads, JSON."""

import json

import pytest

from tinylora_lite.cli import main
from tinylora_lite.experiment.presets import GPUS, preset, preset_names
from tinylora_lite.experiment.settings import load_settings


def test_the_list_names_every_model(capsys):
    assert main(["preset"]) == 0
    out = capsys.readouterr().out
    assert "qwen2.5-7b/gsm8k" in out
    assert "meta-llama/Llama-3.1-8B-Instruct" in out
    assert "NAME/sft by imitation, NAME/calibrated on calibrated directions" in " ".join(out.split())
    assert main(["preset", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["presets"] == list(preset_names())


def test_what_is_printed_is_a_settings_file(capsys, tmp_path):
    assert main(["preset", "qwen2.5-1.5b/gsm8k", "adapter.u=2", "--gpu", "t4", "--seed", "5"]) == 0
    path = tmp_path / "settings.yaml"
    path.write_text(capsys.readouterr().out)
    wanted = preset("qwen2.5-1.5b/gsm8k", "t4").override(["adapter.u=2", "training.seed=5"])
    assert load_settings(path) == wanted
    assert path.read_text().startswith("# qwen2.5-1.5b/gsm8k, for t4; paper: arXiv 2602.04118")
    assert main(["preset", "nano", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == preset("nano").to_dict()


def test_an_unknown_name_is_one_line(capsys):
    assert main(["preset", "gpt-5"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_the_help_names_every_gpu(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["preset", "--help"])
    assert "t4, a100-80gb or h100 (default: a100-80gb)" in " ".join(capsys.readouterr().out.split())
    assert GPUS == ("t4", "a100-80gb", "h100")
