"""What is made once from a base: calibrations with other settings, directions of imitation, its own answers."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tinylora_lite import nano
from tinylora_lite.adapter.basis import Basis
from tinylora_lite.adapter.tying import find_target_modules
from tinylora_lite.lab import bases, tasks
from tinylora_lite.lab.bases import calibrated_basis, imitated_basis
from tinylora_lite.lab.tasks import own_demonstrations
from tinylora_lite.lab.trial import Trial
from tinylora_lite.tasks.task import Example, Task
from tinylora_lite.training.batches import draw_prompts
from tinylora_lite.training.settings import GRPOSettings
from tinylora_lite.training.sft import encode_solutions

TRIAL = Trial(numbers="calibrated", rank=2, u=3, n_tie="all")


@pytest.fixture(autouse=True)
def kept_in(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TINYLORA_CACHE", str(tmp_path))


def test_a_setting_that_calibration_does_not_have_is_named():
    with pytest.raises(TypeError, match="wings"):
        calibrated_basis(replace(TRIAL, calibration="wings=2"))


def test_each_setting_reaches_the_calibration_and_has_a_file_of_its_own(tmp_path, monkeypatch):
    calls = []

    def calibrate(model, tokenizer, task, **options):
        calls.append((model, task, options))
        return Basis(torch.eye(4).view(4, 1, 2, 2), ("m",), "left", {})

    loaded = []
    monkeypatch.setattr(bases.nano, "load", lambda name: (loaded.append(name), None))
    monkeypatch.setattr(bases, "calibrate", calibrate)
    monkeypatch.setattr(tasks, "_fingerprint", lambda base: f"first {base}")
    monkeypatch.setattr(bases, "task_of", lambda name, base: name)
    for calibration in ("", "problems=32", "task=adding", "base=llama-0.4m"):
        for seed in (0, 1):
            calibrated_basis(replace(TRIAL, calibration=calibration, seed=seed))
    calibrated_basis(TRIAL)
    assert [options.get("problems") for _, _, options in calls] == [None, None, 32, 32, None, None, None, None]
    assert [task for _, task, _ in calls] == ["nano"] * 4 + ["adding"] * 2 + ["nano"] * 2
    assert loaded == ["qwen2-0.4m"] * 6 + ["llama-0.4m"] * 2
    assert [options["seed"] for _, _, options in calls] == [0, 1] * 4
    assert len(list(tmp_path.rglob("*.safetensors"))) == 8
    # A base that was trained again is another base, whatever its name.
    monkeypatch.setattr(tasks, "_fingerprint", lambda base: f"second {base}")
    calibrated_basis(TRIAL)
    assert len(list(tmp_path.rglob("*.safetensors"))) == len(calls) == 9


@pytest.mark.parametrize("sigma", ["left", "right"])
def test_directions_of_imitation_are_those_of_dense_gradients(model, tokenizer, sigma):
    """The gradient of every entry of R from the dense gradient of W in float64, and numpy's singular vectors."""
    answers = [Example(f"ann has {i}?", str(i), f" she has {i} and {2 * i}.") for i in range(1, 7)]
    task = Task("shown", answers, answers, answers, lambda text, gold: 0.0)
    trial = replace(TRIAL, sigma=sigma)
    basis = imitated_basis(model, tokenizer, task, trial, problems=6, directions=3)
    assert basis.directions.shape == (3, 14, 2, 2)

    # In the order in which it draws them: the signs of singular vectors do not depend on it, but the test should not.
    examples = draw_prompts(task.train, GRPOSettings(prompts_per_step=6, seed=0), 0)
    names = [target.name for target in find_target_modules(model)]
    frames = {}
    for name in names:
        U, S, Vh = torch.linalg.svd(model.get_submodule(name).weight.detach().double(), full_matrices=False)
        frames[name] = (U[:, :2], S[:2], Vh[:2])
    reference = model.double().requires_grad_(True)
    rows = []
    for example in examples:
        shown = encode_solutions(tokenizer, task, [example])
        prompt, answer = shown.prompt_ids[0], shown.completion_ids[0]
        logits = reference(torch.cat([prompt, answer])[None]).logits[0, len(prompt) - 1 : -1]
        loss = -logits.log_softmax(-1).gather(1, answer[:, None]).sum()
        gradients = torch.autograd.grad(loss, [reference.get_submodule(name).weight for name in names])
        entries = []
        for name, G in zip(names, gradients, strict=True):
            U, S, Vh = frames[name]
            left, right = (U * S, Vh) if sigma == "left" else (U, S[:, None] * Vh)
            entries.append((left.T @ G @ right.T).flatten())
        rows.append(torch.cat(entries))
    axes = torch.linalg.svd(torch.stack(rows), full_matrices=False)[2][:3]
    # The sign of a singular pair of W is free, and flips entries of R: compare what does not depend on it.
    torch.testing.assert_close(
        axes.abs().sort(1).values, basis.directions.flatten(1).double().abs().sort(1).values, atol=2e-3, rtol=0
    )


def test_own_answers_are_right_and_made_once(monkeypatch):
    whole = nano.task()
    few = replace(whole, train=whole.train[:24], validation=whole.validation[:4], test=whole.test[:4])
    monkeypatch.setattr(tasks.nano, "task", lambda: few)
    found = own_demonstrations("qwen2-0.4m")
    assert 0 < len(found.train) < 24
    golds = {example.prompt: example.gold for example in few.train}
    for example in found.train:
        assert example.gold == golds[example.prompt]
        assert few.reward(example.solution, example.gold) == 1.0
    monkeypatch.setattr(tasks, "evaluate", lambda *_, **__: pytest.fail("the answers were there"))
    assert own_demonstrations("qwen2-0.4m").train == found.train


def test_the_first_right_answer_is_the_one_that_is_kept(monkeypatch):
    example = nano.task().train[0]
    told = [SimpleNamespace(prompt=example.prompt, text=text, reward=r) for text, r in (("a", 0), ("b", 1), ("c", 1))]
    monkeypatch.setattr(tasks, "evaluate", lambda *_, **__: SimpleNamespace(completions=told))
    found = own_demonstrations("qwen2-0.4m")
    assert [e.solution for e in found.train] == ["b"]
