"""tinylora plan-run: tables for people, JSON for programs, of a preset and of a file."""

import json

from tinylora_lite.cli import main
from tinylora_lite.experiment.presets import preset


def test_a_preset_that_fits(capsys):
    assert main(["plan-run", "qwen2.5-0.5b/gsm8k", "--gpu", "t4", "--price", "0.5"]) == 0
    out = capsys.readouterr().out
    for text in ("13 parameters on Tesla T4", "base weights", "keys and values", "hours a run", "cost", "It fits."):
        assert text in out
    assert "The time supposes" in out
    assert "does not fit" not in out


def test_plans_and_presets_know_a_gpu_by_the_same_names(capsys):
    for other, name in (("a100", "a100-80gb"), ("H100-80GB", "h100")):
        for command in ("plan-run", "preset"):
            printed = []
            for gpu in (other, name):
                assert main([command, "qwen2.5-0.5b/gsm8k", "--gpu", gpu, "--json"]) == 0
                printed.append(capsys.readouterr().out)
            assert printed[0] == printed[1]


def test_a_preset_that_does_not(capsys):
    assert main(["plan-run", "qwen2.5-7b/gsm8k", "--gpu", "4090"]) == 0
    out = capsys.readouterr().out
    assert "It does not fit" in out
    lines = out.partition("It does not fit")[0].splitlines()
    totals = [line for line in lines if "all of it" in line]
    assert all("does not fit" in line for line in totals)
    assert set(lines[lines.index(totals[0]) - 1].strip()) == {"─"}, "a rule is above the totals"
    assert "It fits with: " in out
    assert "hours a run" not in out


def test_a_file_as_json(capsys, tmp_path):
    path = preset("qwen2.5-0.5b/gsm8k", "h100").save(tmp_path / "settings.yaml")
    several = ["plan-run", str(path), "training.micro_batch=4", "--gpu", "h100", "--gpus", "2", "--json"]
    assert main(several) == 0
    refused = json.loads(capsys.readouterr().out)
    assert not refused["fits"], "each process would need an engine of its own"
    several[3:3] = ["sampler.engine=vllm-server", "sampler.url=http://127.0.0.1:8000"]
    assert main(several) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"]
    assert plan["parameters"] == 13
    assert plan["gpus"] == 2
    assert plan["runs"] == 7
    assert plan["cost"] is None
    assert plan["hours"]["low"] < plan["hours"]["high"]


def test_mistakes_are_one_line(capsys):
    for argv in (["qwen2.5-7b/gsm8k", "--gpu", "abacus"], ["gpt-5"], ["qwen2.5-7b/gsm8k", "adapter.rnak=2"]):
        assert main(["plan-run", *argv]) == 1
        assert capsys.readouterr().err.count("\n") == 1


def test_on_a_cpu_memory_is_planned_and_no_time(capsys):
    argv = ["plan-run", "nano", "--price", "2"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    for text in ("13 parameters on CPU", "Python, PyTorch and transformers", "what the CPU has for it", "It fits."):
        assert text in out
    assert "hours" not in out
    assert main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["time"], found["cost"], found["gpu"]["name"]) == (None, None, "CPU")
    assert found["capacity"] > max(found["peaks"].values()) > 2**29
