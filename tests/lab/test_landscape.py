"""Landscapes: what stands at each point, what an interruption costs, and what the drawings show."""

import json

import numpy as np
import pytest
import torch

from benchmarks import landscape
from benchmarks.landscape import VIEWS, View, paths, surface, walk
from tinylora_lite import TinyLoraConfig, attach, evaluate, evaluate_population, nano
from tinylora_lite.lab import landscape as drawn
from tinylora_lite.lab.tasks import task_of
from tinylora_lite.lab.trial import Trial
from tinylora_lite.training.sft import encode_solutions

CONFIG = TinyLoraConfig(rank=2, u=1, n_tie=25)
AXES = ((-0.4, 0.0, 0.4), (0.0, 0.3))
BASE = "qwen2-0.4m"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return surface(BASE, CONFIG, AXES, 8, tmp_path_factory.mktemp("land") / "landscape-small.json")


def test_at_zero_stands_the_untouched_base_and_elsewhere_the_moved_one(found):
    assert len(found["reward"]) == 6
    model, tokenizer = nano.load(BASE)
    options = {"split": "validation", "problems": 8, "max_new_tokens": nano.MAX_NEW_TOKENS, "seed": 0}
    plain = evaluate(model, tokenizer, nano.task(), **options)
    assert found["reward"][2] == pytest.approx(plain.accuracy)  # the product's third point is (0, 0)
    adapter = attach(model, CONFIG)
    with torch.no_grad():
        adapter.vectors.copy_(torch.tensor([[0.4], [0.3]]))
    moved = evaluate(model, tokenizer, nano.task(), **options)
    assert found["reward"][5] == pytest.approx(moved.accuracy)
    assert found["low"][5] <= found["reward"][5] <= found["high"][5]


def test_losses_are_the_mean_surprise_of_a_token(found):
    """Written out in float64 at (-0.4, 0.3), answer by answer, from plain logits."""
    model, tokenizer = nano.load(BASE)
    adapter = attach(model, CONFIG)
    with torch.no_grad():
        adapter.vectors.copy_(torch.tensor([[-0.4], [0.3]]))
    for writer, name in landscape.WRITERS.items():
        task, surprise, tokens = task_of(name, BASE), 0.0, 0
        for example in task.validation[:8]:
            shown = encode_solutions(tokenizer, task, [example])
            prompt, answer = shown.prompt_ids[0], shown.completion_ids[0]
            with torch.no_grad():
                logits = model(torch.cat([prompt, answer])[None]).logits[0, len(prompt) - 1 : -1].double()
            surprise -= logits.log_softmax(-1).gather(1, answer[:, None]).sum().item()
            tokens += len(answer)
        assert found[writer][1] == pytest.approx(surprise / tokens, rel=1e-3)


def test_a_surface_goes_on_where_it_was_interrupted(found, tmp_path, monkeypatch):
    monkeypatch.setattr(landscape, "ROWS", 16)  # two points of eight problems to a batch
    path = tmp_path / "landscape-small.json"
    cut = dict(found, **{key: found[key][:2] for key in ("reward", "low", "high", *landscape.WRITERS)})
    path.write_text(json.dumps(landscape.rounded(cut)))
    batches, scored = [], evaluate_population
    monkeypatch.setattr(landscape, "evaluate_population", lambda *a, **k: (batches.append(1), scored(*a, **k))[1])
    again = surface(BASE, CONFIG, AXES, 8, path)
    assert len(batches) == 2
    for key in ("reward", *landscape.WRITERS):
        assert again[key] == pytest.approx(found[key], rel=1e-3)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    surface(BASE, CONFIG, AXES, 8, path)
    assert len(batches) == 2
    with pytest.raises(ValueError, match="holds a landscape of other settings"):
        surface(BASE, CONFIG, AXES, 9, path)
    with pytest.raises(ValueError, match="numbers"):
        surface(BASE, TinyLoraConfig(rank=2, u=1, n_tie=4), AXES, 8, tmp_path / "other.json")


def test_paths_start_at_zero_and_those_that_are_there_are_not_walked_again(tmp_path, monkeypatch):
    view = View("small", Trial(n_tie=25), ((-0.4, 0.4),) * 2, 3, 4, 0.05)
    walked = []

    def paths(trials, config):
        walked.append((trials[0].method, [t.seed for t in trials], trials[0].learning_rate))
        return [[[0.0, 0.0], [0.1, 0.2]] for _ in trials]

    monkeypatch.setattr(landscape, "paths", paths)
    nothing = {"paths": {}, "seconds": 0.0}
    once = walk(view, nothing, tmp_path / "small.json")
    assert walked == [(method, [0, 1, 2], 0.05) for method in ("grpo", "es", "sft")]
    walk(view, once, tmp_path / "small.json")
    assert len(walked) == 3
    once["paths"]["es"]["settings"]["steps"] = 7
    walk(view, once, tmp_path / "small.json")
    assert [method for method, *_ in walked[3:]] == ["es"]
    assert json.loads((tmp_path / "small.json").read_text())["paths"].keys() == {"grpo", "es", "sft"}


@pytest.mark.parametrize("method", ["grpo", "es", "sft"])
def test_a_path_has_a_point_for_every_step_and_one_before(method):
    trials = [
        Trial(method=method, steps=2, learning_rate=0.05, seed=seed, trained_on=landscape.WRITERS["stranger"])
        for seed in (0, 1)
    ]
    walked = np.array(paths(trials, CONFIG))
    assert walked.shape == (2, 3, 2)
    assert (walked[:, 0] == 0).all()
    assert (walked[:, 1:] != 0).all()
    assert (walked[0] != walked[1]).any()


def made_up(numbers: int) -> dict:
    axis = list(np.linspace(-1, 1, 5))
    points = np.array(np.meshgrid(*[axis] * numbers, indexing="ij")).reshape(numbers, -1)
    distance = ((points - 0.5) ** 2).sum(0)
    found = {"settings": {"axes": [axis] * numbers}, "reward": list(0.9 - 0.2 * distance)}
    found |= {"low": list(0.85 - 0.2 * distance), "high": list(0.95 - 0.2 * distance)}
    found |= {"careful": list(1 + distance), "stranger": list(2 - 0.1 * distance)}
    walk = [[0.0] * numbers, [0.25] * numbers, [0.5] * numbers]
    return found | {"paths": {name: {"v": [walk, walk]} for name in ("grpo", "es", "sft")}}


def test_two_numbers_are_drawn_with_their_paths(tmp_path):
    figure = drawn.contours(made_up(2), "careful")
    figure.savefig(tmp_path / "two.svg")
    reward, loss = figure.axes[:2]
    assert (reward.get_title("left"), loss.get_title("left")) == ("mean reward", "loss, nats a token")
    for axes in (reward, loss):
        ends = [tuple(line.get_xydata()[0]) for line in axes.lines if len(line.get_xdata()) == 1]
        assert ends == [(0.5, 0.5)] * 6
        assert axes.get_xlim() == (-1, 1)


def test_the_first_number_runs_along_the_horizontal_axis():
    """The reward rises with the first number only: contours are vertical."""
    found = made_up(2)
    found["reward"] = [x for x in found["settings"]["axes"][0] for _ in range(5)]
    axes = drawn.contours(found).axes[0]
    band = next(path for path in axes.collections[0].get_paths() if len(path.vertices))
    xs, ys = band.vertices.T
    assert np.ptp(ys) == pytest.approx(2.0)
    assert np.ptp(xs) < 0.5


def test_one_number_is_drawn_with_where_training_ended(tmp_path):
    figure = drawn.along(made_up(1))
    figure.savefig(tmp_path / "one.svg")
    above, below = figure.axes
    ends = [line for line in above.lines if list(line.get_xdata()) == [0.5, 0.5]]
    assert len(ends) == 3
    assert list(ends[0].get_ydata()) == pytest.approx([0.9, 0.9])
    least = [line.get_xdata()[0] for line in below.lines if len(line.get_xdata()) == 1]
    assert least == [0.5, -1.0]  # the careful writer's loss is least at 0.5, the stranger's where the reward is not


def test_drawings_refuse_what_they_cannot_show():
    with pytest.raises(ValueError, match=r"values to unpack \(expected 2, got 1\)"):
        drawn.contours(made_up(1))


def test_the_command_names_what_there_is(tmp_path, capsys):
    with pytest.raises(SystemExit):
        landscape.main(["nowhere", "--folder", str(tmp_path)])
    assert "no landscape named nowhere; there are: calibrated-2" in capsys.readouterr().err


def test_what_is_computed_is_what_can_be_read():
    assert tuple(view.name for view in VIEWS) == drawn.NAMES
    assert tuple(landscape.WRITERS) == drawn.WRITERS
    for view in VIEWS:
        assert drawn.load(view.name)["settings"]["axes"] == landscape.rounded(view.axes)
