"""A checkpoint is whole, refuses to be mistaken for another, and says so when it is damaged."""

import dataclasses

import pytest
import torch

from tinylora_lite import GRPOSettings
from tinylora_lite.training.loop import DEFAULTS
from tinylora_lite.utils.record import Run, save_checkpoint
from tinylora_lite.utils.record import resume as resume_with


def resume(folder, run, parameters, optimizer):
    resume_with(folder, run, parameters, optimizer, DEFAULTS)


def a_run(**changes) -> Run:
    settings = dataclasses.asdict(GRPOSettings(steps=3, **changes.pop("settings", {})))
    return Run(
        **{"method": "grpo", "settings": settings, "adapter": {"kind": "two parameters"}, "parameters": 2, "task": "t"}
        | changes
    )


def numbers(value: float = 0.0, size: int = 2):
    parameter = torch.nn.Parameter(torch.full((size,), value))
    return [parameter], torch.optim.Adam([parameter], lr=0.1)


@pytest.fixture
def folder(tmp_path):
    """A run of two steps, with momentum."""
    parameters, optimizer = numbers(1.0)
    parameters[0].grad = torch.tensor([1.0, -2.0])
    optimizer.step()
    run = a_run()
    run.steps += [{"step": 1, "reward": 0.5}, {"step": 2, "reward": 0.75}]
    run.evaluations.append({"step": 2, "accuracy": 0.5})
    run.seconds = 12.5
    save_checkpoint(tmp_path, run, parameters, optimizer)
    return tmp_path


def test_all_of_it_comes_back(folder):
    run, (parameters, optimizer) = a_run(), numbers()
    resume(folder, run, parameters, optimizer)
    assert torch.allclose(parameters[0], torch.tensor([0.9, 1.1]))
    (state,) = optimizer.state.values()
    assert torch.allclose(state["exp_avg"], torch.tensor([0.1, -0.2]))
    assert run == Run.load(folder / "run.json")
    assert (len(run.steps), run.evaluations, run.seconds) == (2, [{"step": 2, "accuracy": 0.5}], 12.5)


def test_without_a_checkpoint_nothing_changes(tmp_path):
    run, (parameters, optimizer) = a_run(), numbers(3.0)
    resume(tmp_path / "new", run, parameters, optimizer)
    assert run == a_run()
    assert parameters[0].tolist() == [3.0, 3.0]


def test_steps_and_save_every_may_differ(folder):
    run, (parameters, optimizer) = a_run(), numbers()
    run.settings |= {"steps": 50, "save_every": 1}
    resume(folder, run, parameters, optimizer)
    assert (len(run.steps), run.settings["steps"], run.settings["save_every"]) == (2, 50, 1)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"settings": {"learning_rate": 0.5}}, "learning_rate = 0.01, not 0.5"),
        ({"settings": {"seed": 1}}, "seed = 0, not 1"),
        ({"adapter": {"kind": "all weights"}}, "kind = 'two parameters', not 'all weights'"),
        ({"task": "u"}, "task = 't', not 'u'"),
        ({"method": "sft"}, "method = 'grpo', not 'sft'"),
        ({"base": "ab12"}, "base = '', not 'ab12'"),
    ],
)
def test_another_run_is_refused_and_nothing_changes(folder, change, match):
    run, (parameters, optimizer) = a_run(**change), numbers(3.0)
    with pytest.raises(ValueError, match=match) as error:
        resume(folder, run, parameters, optimizer)
    assert str(folder) in str(error.value)
    assert parameters[0].tolist() == [3.0, 3.0]
    assert not run.steps


def test_steps_may_not_differ_where_the_learning_rate_depends_on_them(tmp_path):
    run = a_run(settings={"schedule": "linear"})
    save_checkpoint(tmp_path, run, *numbers())
    run.settings["steps"] = 50
    with pytest.raises(ValueError, match="steps = 3, not 50"):
        resume(tmp_path, run, *numbers())


def test_fewer_steps_than_done(folder):
    run = a_run()
    run.settings["steps"] = 1
    with pytest.raises(ValueError, match="2 steps, more than steps=1"):
        resume(folder, run, *numbers())


def test_another_shape(folder):
    with pytest.raises(ValueError, match="another shape"):
        resume(folder, a_run(), *numbers(size=3))


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


@pytest.mark.parametrize("damage", [cut, lambda _: b"", lambda _: b"not a checkpoint"])
def test_a_damaged_file(folder, damage):
    path = folder / "checkpoint.pt"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"damaged .*; delete it to start the run again") as error:
        resume(folder, a_run(), *numbers())
    assert "\n" not in str(error.value)


def test_a_foreign_file(folder):
    torch.save({"weights": torch.zeros(2)}, folder / "checkpoint.pt")
    with pytest.raises(ValueError, match="damaged"):
        resume(folder, a_run(), *numbers())


def test_a_save_that_fails_leaves_the_old_checkpoint(folder, monkeypatch):
    before = (folder / "checkpoint.pt").read_bytes()

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space"):
        save_checkpoint(folder, a_run(), *numbers())
    assert (folder / "checkpoint.pt").read_bytes() == before
