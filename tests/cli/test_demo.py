"""The demo, cut down to one step: what it prints and what it leaves behind."""

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import tinylora_lite as tl
from tinylora_lite import nano
from tinylora_lite.adapter.attached import adapter_of
from tinylora_lite.adapter.tying import find_target_modules
from tinylora_lite.cli import demo, main
from tinylora_lite.experiment import runner
from tinylora_lite.files import adapter_file as files


@pytest.fixture(scope="module")
def basis() -> tl.Basis:
    """Random directions: no test depends on the basis that is shipped."""
    model, _ = nano.load()
    names = tuple(site.name for site in find_target_modules(model))
    flat = torch.randn(len(names) * 64, 13, generator=torch.Generator().manual_seed(0))
    return tl.Basis(torch.linalg.qr(flat)[0].T.reshape(13, len(names), 8, 8).contiguous(), names)


@pytest.fixture(autouse=True)
def small(monkeypatch, basis):
    """Steps of 8 · 4 completions."""
    monkeypatch.setattr(nano, "basis", lambda: basis)
    monkeypatch.setattr(demo, "PROMPTS", 8)
    monkeypatch.setattr(demo, "GROUP_SIZE", 4)


def run(capsys, folder, *argv: str) -> tuple[dict, str]:
    assert main(["demo", "--json", "--steps", "1", "--problems", "8", "--folder", str(folder), *argv]) == 0
    captured = capsys.readouterr()
    (line,) = captured.out.splitlines()
    return json.loads(line), captured.err


def test_json(capsys, tmp_path, basis):
    result, progress = run(capsys, tmp_path, "--seed", "11")
    assert result["parameters"] == result["random"]["parameters"] == 13
    assert result["payload_bytes"] == 26
    for score in (result["base"], result["trained"], result["random"]["trained"]):
        assert score["n"] == 8
        assert 0 <= score["low"] <= score["accuracy"] <= score["high"] <= 1
    assert result["seconds"] > 0
    for adapter in (result, result["random"]):
        assert Path(adapter["file"]).stat().st_size == adapter["bytes"] <= 4096
    assert "random: step 1 of 1, reward" in progress
    assert "calibrated: pass@1" in progress

    model, _ = nano.load()
    assert files.load(model, result["random"]["file"]).config == tl.plan(model, 13, seed=11)
    model, _ = nano.load()
    assert files.load(model, result["file"], basis=basis).num_parameters == 13
    records = {path.name: tl.Run.load(path) for path in tmp_path.glob("*.json")}
    assert {name: len(record.steps) for name, record in records.items()} == {
        "random.run.json": 1,
        "calibrated.run.json": 1,
    }


def test_the_seed_decides(tmp_path):
    def trained(seed: int, folder: str) -> list:
        made, scores = demo.run_demo(steps=1, problems=4, seed=seed, folder=tmp_path / folder)
        vectors = [load_file(found["file"])["vectors"].tolist() for found in (made["random"], made)]
        return [*vectors, [c.text for c in scores["base"].completions]]

    first = trained(1, "a")
    assert trained(1, "b") == first
    assert all(one != other for one, other in zip(trained(2, "c"), first, strict=True))


def test_calibrating_anew(capsys, tmp_path, monkeypatch, basis):
    def calibrate(model, tokenizer, task, *, rank, directions, seed, max_new_tokens, progress, sampler):
        progress(1, 2)
        assert (rank, directions, seed) == (8, 13, 5)
        return tl.Basis(basis.directions.flip(0), basis.names)

    monkeypatch.setattr(runner, "calibrate", calibrate)
    result, progress = run(capsys, tmp_path, "--calibrate", "--seed", "5")
    assert "calibrating a basis" in progress
    # Found beside the adapter, without being named.
    model, _ = nano.load()
    loaded = files.load(model, result["file"])
    assert torch.equal(loaded.config.projection.directions, basis.directions.flip(0))


def test_in_words(capsys, tmp_path):
    assert main(["demo", "--steps", "1", "--problems", "4", "--folder", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    for text in ("pass@1", "test problem 3", "13 parameters, 26 bytes", "calibrated.tinylora", "a line of prompt"):
        assert text in captured.out
    assert "training: random\n" in captured.err


def test_the_report_fits(tmp_path):
    made, scores = demo.run_demo(steps=1, problems=4, folder=tmp_path)
    for width in (60, 120):
        console = Console(record=True, width=width, file=io.StringIO())
        console.print(demo.report(made, scores))
        text = console.export_text()
        assert max(map(len, text.splitlines())) <= width
        assert scores["base"].completions[0].prompt.split()[0] in text


def test_an_error_leaves_no_adapter_on_the_model(tmp_path, monkeypatch):
    model, _ = nano.load()
    monkeypatch.setattr(runner, "load_model", lambda *args, **options: model)
    monkeypatch.setattr(tl, "save", lambda adapter, file: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        demo.run_demo(steps=1, problems=1, folder=tmp_path)
    assert adapter_of(model) is None


def test_a_folder_that_cannot_be_made_is_noticed_before_training(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "train_grpo", lambda *args, **options: pytest.fail("it has begun to train"))
    (tmp_path / "taken").touch()
    assert main(["demo", "--folder", str(tmp_path / "taken")]) == 1
    assert str(tmp_path / "taken") in capsys.readouterr().err
