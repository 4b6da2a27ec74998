"""tinylora eval: what it prints, what it keeps, and one line for every mistake."""

import json
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, AutoTokenizer

import tinylora_lite as tl
from tinylora_lite import nano
from tinylora_lite.cli import main
from tinylora_lite.evaluation.score import Score
from tinylora_lite.sampling.sampler import ModelSampler


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """Numbers that were not trained: the first layers turned enough for other answers."""
    model, _ = nano.load()
    attached = tl.attach(model, tl.TinyLoraConfig(rank=2, u=1, n_tie=16))
    with torch.no_grad():
        attached.vectors += 0.3
    return tl.save(attached, tmp_path_factory.mktemp("adapter") / "a.tinylora", "fp32")


def run(capsys, *argv: object) -> dict:
    assert main(["eval", *map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_base(capsys):
    found = run(capsys, "nano", "--task", "nano", "--problems", 30, "--seed", 3, "--temperature", 1)
    model, tokenizer = nano.load()
    options = {"problems": 30, "max_new_tokens": nano.MAX_NEW_TOKENS, "seed": 3, "batch_size": 128}
    expected = tl.evaluate(model, tokenizer, nano.task(), **options)
    (result,) = found["results"]
    low, high = expected.bootstrap()
    assert result == {
        "task": "nano",
        "score": expected.details() | {"bootstrap_low": low, "bootstrap_high": high},
    }
    assert {"lenient", "formatted", "truncated", "tokens"} < result["score"].keys()
    assert (found["seed"], found["temperature"], found["engine"]) == (3, 1.0, "transformers")


def test_base_and_adapted_are_compared(capsys, adapter, tmp_path):
    options = ("--task", "nano", "--problems", 24, "--samples", 2, "--folder", tmp_path / "out")
    found = run(capsys, "nano", "--adapter", adapter, "--compare", *options)
    (result,) = found["results"]
    assert found["temperature"] == 1.0, "several greedy samples would all be the same"
    base, adapted = (Score.load(tmp_path / "out" / "nano" / name) for name in ("base", "adapted"))
    assert [c.text for c in base.completions] != [c.text for c in adapted.completions]
    comparison = tl.compare(base, adapted)
    assert result["comparison"] == comparison.summary()
    assert result["base"]["accuracy"] == base.accuracy
    assert result["score"]["lenient"] == adapted.lenient.accuracy
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == found

    alone = run(capsys, "nano", *options[:-1], tmp_path / "alone")
    assert alone["results"][0]["score"] == result["base"], "the base is the base, with an adapter or without"


def test_it_goes_on_where_it_stopped(capsys, adapter, tmp_path, monkeypatch):
    argv = ("nano", "--adapter", adapter, "--compare", "--task", "nano", "--problems", 12, "--batch-size", 4)
    whole = run(capsys, *argv)
    argv += ("--folder", tmp_path)
    sampled = []
    true_sample = ModelSampler.sample

    def sample(self, prompt_ids, *arguments, **options):
        if len(sampled) == 4:
            raise KeyboardInterrupt
        sampled.append(len(prompt_ids))
        return true_sample(self, prompt_ids, *arguments, **options)

    monkeypatch.setattr(ModelSampler, "sample", sample)
    assert main(["eval", *map(str, argv)]) == 130
    sampled[:] = sampled[:2]  # two batches are left to do
    found = run(capsys, *argv)
    assert len(sampled) == 4
    assert found["results"] == whole["results"]
    assert main(["eval", *map(str, argv), "--seed", "1"]) == 1
    assert "seed = 0, not 1" in capsys.readouterr().err


def test_in_words(capsys, adapter, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    argv = ["eval", "nano", "--adapter", str(adapter), "--compare", "--task", "nano", "--problems", "100"]
    assert main([*argv, "--batch-size", "20"]) == 0
    captured = capsys.readouterr()
    assert "nano, strict: " in captured.out
    assert "nano, lenient: " in captured.out
    table = captured.out.partition("nano, strict")[0]
    assert re.search(r"strict +lenient +format +cut off +tokens +n\b", table)
    interval = r"\d+\.\d \[\d+\.\d, \d+\.\d\]"
    for which in ("base", "adapted"):
        assert re.search(rf"nano, {which} +{interval} +{interval} +\d+\.\d +\d+\.\d +\d+ +100\b", table)
    assert max(map(len, table.splitlines())) <= 80
    assert "testing: nano, base\n" in captured.err
    assert "nano, adapted: pass@1" in captured.err


def test_any_checkpoint_s_folder(capsys, tmp_path):
    model, tokenizer = nano.load()
    with torch.no_grad():
        model.model.norm.weight *= 3
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    options = ("--task", "nano", "--problems", 20, "--max-new-tokens", 2)
    found = run(capsys, tmp_path / "model", *options)
    expected = tl.evaluate(
        model, tokenizer, nano.task(), problems=20, max_new_tokens=2, batch_size=128, temperature=0
    ).details()
    assert expected["truncated"] > 0
    score = found["results"][0]["score"]
    assert {key: score[key] for key in expected} == expected


def test_several_tasks_from_a_folder(capsys, tmp_path):
    pytest.importorskip("math_verify")
    row = {"question": "tom has 4 apples. tom buys 3 more. how many apples does tom have?", "answer": "4+3=7\n#### 7"}
    for split in ("train", "test"):
        (tmp_path / "gsm8k").mkdir(exist_ok=True)
        (tmp_path / "gsm8k" / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    argv = ("nano", "--task", "nano", "gsm8k", "--data", tmp_path, "--problems", 1, "--max-new-tokens", 30)
    found = run(capsys, *argv, "--folder", tmp_path / "out")
    assert [result["task"] for result in found["results"]] == ["nano", "gsm8k"]
    (row,) = Score.load(tmp_path / "out" / "gsm8k" / "base").completions
    assert row.gold == "7"


def test_another_engine_answers(capsys, adapter, monkeypatch):
    """What the engine is given, and that it follows the adapter; vLLM itself is tested where it is installed."""
    made = {}

    class Engine:
        def __init__(self, weights, tokenizer, **options) -> None:
            made.update(options, weights=weights, synced=[])
            model, _ = nano.load()
            self.inner = ModelSampler(model, tokenizer)

        def sync(self, attached) -> None:
            made["synced"].append(attached is not None)

        def sample(self, *arguments, **options):
            return self.inner.sample(*arguments, **options)

    import tinylora_lite.sampling.vllm

    monkeypatch.setattr(tinylora_lite.sampling.vllm, "VllmSampler", Engine)
    argv = ("nano", "--task", "nano", "--problems", 5, "--engine", "vllm")
    plain = run(capsys, *argv, "--gpu-memory", 0.2)
    assert made["synced"] == []
    assert (made["gpu_memory_utilization"], made["dtype"], made["tensor_parallel_size"]) == (0.2, "float32", 1)
    assert made["weights"] == str(nano.CHECKPOINTS / nano.BASE)
    found = run(capsys, *argv, "--adapter", adapter, "--compare")
    assert made["synced"] == [False, True]
    assert (made["max_lora_rank"], made["dtype"]) == (2, "float32")
    assert found["results"][0]["base"] == plain["results"][0]["score"]


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["--task", "nope"], "there is no task 'nope'; there are nano, words-1 and so on, gsm8k, math, math500"),
        (["--compare"], "--adapter"),
        (["--basis", "b"], "--adapter"),
        (["--engine", "vllm-server"], "--url names the server of --engine vllm-server; give both or neither"),
        (["--url", "http://x"], "--url names the server of --engine vllm-server"),
        (["--gpu-memory", "0.5"], "--gpu-memory and --tensor-parallel are of --engine vllm"),
        (["--tensor-parallel", "2"], "--gpu-memory and --tensor-parallel are of --engine vllm"),
        (
            ["--engine", "vllm", "--gpu-memory", "1.5"],
            "error: sampler.gpu_memory should be less than or equal to 1, not 1.5",
        ),
        (["--adapter", "nowhere.tinylora"], "no adapter file at nowhere.tinylora"),
        (["--device", "cuda:77"], "no device cuda:77"),
    ],
)
def test_mistakes_take_one_line_and_no_model(capsys, monkeypatch, argv, reason):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **o: pytest.fail("the model was loaded"))
    assert main(["eval", "nano", "--task", "nano", *argv]) == 1
    captured = capsys.readouterr()
    error = captured.err.splitlines()[-1]
    assert captured.out == ""
    assert error.startswith("tinylora eval: error: ")
    assert reason in error


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("--problems", "0", "must be at least 1, not 0"),
        ("--max-new-tokens", "0", "must be at least 1, not 0"),
        ("--samples", "two", "invalid number value: 'two'"),
        ("--temperature", "-1", "must be at least 0, not -1"),
        ("--temperature", "nan", "must be at least 0, not nan"),
    ],
)
def test_a_value_out_of_its_range_is_a_wrong_command_line(capsys, option, value, reason):
    with pytest.raises(SystemExit) as stop:
        main(["eval", "nano", "--task", "nano", option, value])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert f"argument {option}: {reason}" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "offline", "reason"),
    [
        ("/nowhere/model", False, "no folder at /nowhere/model"),
        ("Qwen/Qwen2.5-7B", True, "HF_HUB_OFFLINE is set; unset it, run `hf download Qwen/Qwen2.5-7B`"),
        ("Qwen/Qwen2.5-7B", False, "Qwen/Qwen2.5-7B (We couldn't connect to 'https://huggingface.co'); give the"),
    ],
)
def test_a_model_that_cannot_be_had(capsys, monkeypatch, name, offline, reason):
    def fail(*arguments, **options):
        raise OSError("We couldn't connect to 'https://huggingface.co'\nto load the files")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fail)
    assert main(["eval", name, "--task", "nano"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("tinylora eval: error: ")
    assert reason in error


def test_an_empty_folder(capsys, tmp_path):
    assert main(["eval", str(tmp_path), "--task", "nano"]) == 1
    assert f"{tmp_path} holds no config.json" in capsys.readouterr().err


def test_a_file_that_is_no_adapter(capsys, tmp_path):
    (tmp_path / "a.tinylora").write_text("nothing")
    assert main(["eval", "nano", "--task", "nano", "--adapter", str(tmp_path / "a.tinylora")]) == 1
    assert str(tmp_path / "a.tinylora") in capsys.readouterr().err
