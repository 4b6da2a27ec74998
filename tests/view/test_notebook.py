"""The dashboard: what it shows, what it survives, what it costs."""

import io
import math
import re
import sys
import time
import types
import xml.etree.ElementTree as ElementTree

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("IPython")

import tinylora_lite as tl
from tinylora_lite import Run, nano
from tinylora_lite.evaluation.score import Score
from tinylora_lite.sampling.rollouts import Rollouts
from tinylora_lite.view import notebook
from tinylora_lite.view.notebook import Dashboard, has_front_end

BASE = Score(0.25, 0.21, 0.29, 500, 1, ())
HOSTILE = "<script>alert(1)</script> & </pre><img src=x onerror=alert(2)> \u202e\x00\ud800 \\boxed{\"'}"


def rollouts(texts: list[str], prompt_ids=None) -> Rollouts:
    rows = len(texts)
    ids = torch.arange(rows * 3).view(rows, 3) if prompt_ids is None else prompt_ids
    ones, mask = torch.ones(rows, 4), torch.tensor([[1, 1, 0, 0]] * rows)
    return Rollouts(ids, torch.ones_like(ids), ones.long(), mask, ones, ones, torch.tensor([True] * rows), texts)


def fill(board: Dashboard, steps: int = 12) -> Dashboard:
    board.begin("testing: base", 500)
    board.advance(500, 500)
    board.scored("gsm8k, base", BASE)
    board.begin("training: grpo", 20)
    board.steps = 20
    for step in range(1, steps + 1):
        board.on_rollouts(rollouts(["right", "wrong"]), torch.tensor([[1.0, 0.0]]))
        board.lengths["grpo, rate 1e-04"] = [200.0 + 3 * i for i in range(step)]
        curve = [0.25 + 0.05 * i for i in range(step)]
        board.step("grpo, rate 1e-04", curve, [(-1) ** i * 0.01 * step for i in range(13)])
    return board


def parse(page: str) -> ElementTree.Element:
    """The page as XML: whatever was not escaped breaks it."""
    return ElementTree.fromstring(f"<page>{page.replace('xlink:', '')}</page>")


def text_of(page: str) -> str:
    return " ".join(" ".join(parse(page).itertext()).split())


class Widgets(types.ModuleType):
    """ipywidgets as a test sees it: everything that would have been sent."""

    def __init__(self, broken: bool = False) -> None:
        super().__init__("ipywidgets")
        sent = self.sent = []

        class HTML:
            def __setattr__(self, name, value) -> None:
                if broken:
                    raise RuntimeError("comm is closed\nand more")
                sent.append(value)
                self.__dict__[name] = value

        class Box:
            def __init__(self, children=()) -> None:
                self.children, self.titles = children, {}

            def set_title(self, place, title) -> None:
                self.titles[place] = title

            def close(self) -> None:
                sent.append("closed")

        self.HTML, self.VBox, self.Accordion = HTML, Box, Box


@pytest.fixture
def widgets(monkeypatch):
    made = Widgets()
    monkeypatch.setitem(sys.modules, "ipywidgets", made)
    made.shown = []
    monkeypatch.setattr("IPython.display.display", made.shown.append)
    return made


@pytest.fixture
def clock(monkeypatch):
    """``clock[0]`` is the time in seconds; drawing takes none."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(Dashboard, "_picture", lambda board: "picture")
    return now


def test_what_the_page_says(widgets):
    text = text_of(fill(Dashboard(live=True)).page())
    for part in (
        "training: grpo", "12/20", "reward of each step", "grpo, rate 1e-04: 0.8", "mean tokens of a completion",
        "grpo, rate 1e-04: 233", "v, 13 parameters", "25.0% [21.0%, 29.0%], n = 500",
        "reward 1, 2 tokens, cut off at the limit", "right",
    ):  # fmt: skip
        assert part in text, part


def drawn_figure(board: Dashboard, monkeypatch):
    """The axes that the board draws: curves, lengths, v."""
    from tinylora_lite.view import plot

    found, show = [], plot.show
    monkeypatch.setattr(plot, "show", lambda figure, alt: found.append(figure) or show(figure, alt))
    board.page()
    return found[-1].axes


def test_the_figure_holds_what_was_measured(monkeypatch):
    curves, lengths, v = drawn_figure(fill(Dashboard(live=True)), monkeypatch)
    rewards, base = curves.lines
    assert list(rewards.get_ydata()) == pytest.approx([0.25 + 0.05 * i for i in range(12)])
    assert set(base.get_ydata()) == {0.25}
    assert list(lengths.lines[0].get_ydata()) == [200.0 + 3 * i for i in range(12)]
    assert [bar.get_height() * (1 if bar.get_y() == 0 else -1) for bar in v.patches] == pytest.approx(
        [(-1) ** i * 0.12 for i in range(13)]
    )
    assert curves.get_xlim()[1] >= 20, "the axis is as long as the whole run"
    assert curves.get_ylim()[1] >= 1, "and as high as a reward can be"


def test_hostile_text_stays_text(widgets):
    board = Dashboard(types.SimpleNamespace(decode=lambda ids: HOSTILE), live=True)
    board.begin(HOSTILE[:60], 3)
    board.on_rollouts(rollouts([HOSTILE, HOSTILE]), torch.tensor([[1.0, 0.0]]))
    board.step("a <b>", [0.5, 0.6], [0.1])
    board.scored("<script>", BASE)
    page = board.page()
    assert not re.search(r"<(script|img)", page)
    assert page.count("&lt;script&gt;") >= 6
    parse(page)
    page.encode("utf-8")
    assert board.live


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_does_not_stop_it(widgets, bad):
    board = Dashboard(live=True)
    board.steps = 5
    board.lengths["a"] = [bad, 20.0, bad]
    board.step("a", [0.1, bad, 0.3, 0.4, bad], [0.1, bad, -0.2])
    board.scored("a", Score(bad, bad, bad, 3, 1, ()))
    board.on_rollouts(rollouts(["x", "y"]), torch.tensor([[bad, 0.0]]))
    assert f"reward {bad:g}" in text_of(board.page())
    assert board.live


def test_nothing_at_all_can_be_drawn(widgets):
    assert "not evaluated yet" in text_of(Dashboard(live=True).page())


def test_groups_that_disagree_are_shown_first():
    board = Dashboard(live=True)
    rewards = torch.tensor([[1.0] * 4, [0.0] * 4, [0.0, 1.0, 0.0, 0.0], [0.0] * 4])
    board.on_rollouts(rollouts([f"answer {i}" for i in range(16)]), rewards)
    shown = re.findall(r"answer \d+", board.page())
    assert shown == [f"answer {i}" for i in (8, 9, 10, 11, 0, 1, 2, 3)]


def test_the_prompt_is_decoded_without_its_padding():
    seen = []
    tokenizer = types.SimpleNamespace(decode=lambda ids: seen.append(ids.tolist()) or "Question")
    one = rollouts(["x"], torch.tensor([[0, 0, 7, 8]]))
    one.prompt_mask[0, :2] = 0
    board = Dashboard(tokenizer, live=True)
    board.on_rollouts(one, torch.tensor([[1.0]]))
    assert seen == [[7, 8]]
    assert "Question" in board.page()


def test_pictures_are_sent_once_a_second_at_most(widgets, clock):
    board = Dashboard(live=True)
    for step in range(100):
        clock[0] += 0.1
        board.step("a", [0.5] * (step + 1), [0.1])
    assert 9 <= widgets.sent.count("picture") <= 11


def test_slow_pictures_are_drawn_less_often(widgets, clock, monkeypatch):
    def slow(board) -> str:
        clock[0] += 0.2
        return "picture"

    monkeypatch.setattr(Dashboard, "_picture", slow)
    board = Dashboard(live=True)
    for step in range(2000):
        clock[0] += 0.1
        board.step("a", [0.5] * (step + 1), [0.1])
    drawn = widgets.sent.count("picture")
    assert drawn * 0.2 <= 0.012 * (clock[0] - 100)
    assert drawn >= 9


def test_a_new_phase_is_shown_at_once(widgets, clock):
    board = Dashboard(live=True)
    for phase in ("loading", "testing"):
        board.begin(phase)
    assert widgets.sent.count("picture") == 2


def test_a_broken_front_end_is_said_once_and_ends_in_lines(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ipywidgets", Widgets(broken=True))
    monkeypatch.setattr("IPython.display.display", lambda shown: None)
    with Dashboard(live=True) as board:
        fill(board, steps=3)
    out = capsys.readouterr().out
    assert out.count("The dashboard stopped, training goes on (RuntimeError: comm is closed).") == 1
    assert "testing: base" in out
    assert "step 3 of 20, reward 0.350" in out


def test_broken_rollouts_never_reach_training(widgets, capsys):
    board = Dashboard(live=True)
    board.on_rollouts(None, None)
    board.step("a", [0.5], [0.1])
    assert "The dashboard stopped" in capsys.readouterr().out


def test_without_a_front_end_it_prints_lines(capsys):
    with Dashboard() as board:
        assert not board.live
        fill(board, steps=2)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("] ")[1].strip() for line in lines] == [
        "testing: base", "gsm8k, base: pass@1 25.0% [21.0%, 29.0%], n = 500", "training: grpo",
        "grpo, rate 1e-04: step 1 of 20, reward 0.250", "grpo, rate 1e-04: step 2 of 20, reward 0.300",
    ]  # fmt: skip


def test_at_the_end_plain_html_takes_the_widget_s_place(widgets):
    with Dashboard(live=True) as board:
        fill(board)
    assert widgets.sent[-1] == "closed"
    assert "<details" in widgets.shown[-1].data
    assert "12/20" in text_of(widgets.shown[-1].data)


def test_an_interruption_leaves_the_last_state_too(widgets):
    board = fill(Dashboard(live=True))
    board.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert "training: grpo" in text_of(widgets.shown[-1].data)


def test_a_test_and_a_notebook_that_a_program_runs_have_no_reader(monkeypatch):
    for name in notebook.FRONT_ENDS:
        monkeypatch.delenv(name, raising=False)
    assert not has_front_end()
    monkeypatch.setenv("JPY_SESSION_NAME", "book.ipynb")
    assert not has_front_end(), "a variable alone is no kernel"
    monkeypatch.setattr("IPython.get_ipython", lambda: types.SimpleNamespace(kernel=None))
    assert has_front_end()


def test_it_works_with_the_real_widgets(monkeypatch):
    pytest.importorskip("ipywidgets")
    monkeypatch.setattr("sys.stdout", io.StringIO())
    with Dashboard(live=True) as board:
        fill(board, steps=2)
        board.begin("testing")  # draws what came since the last drawing
        picture, accordion = board._box.children
        assert "testing" in picture.value
        assert [page.value.count("<pre") for page in accordion.children] == [1, 1]
        assert accordion.get_title(0).startswith("reward 1")
    assert board.live


def test_it_follows_the_loops_of_the_library(capsys):
    model, tokenizer = nano.load()
    short = {"steps": 2, "prompts_per_step": 2, "learning_rate": 0.1, "max_new_tokens": 64}
    for train, settings, measure in (
        (tl.train_grpo, tl.GRPOSettings(group_size=2, **short), "reward"),
        (tl.train_sft, tl.SFTSettings(**short), "loss"),
    ):
        adapter = tl.attach(model, tl.TinyLoraConfig(n_tie=4))
        board = Dashboard(tokenizer, adapter, live=False)
        options = {"on_rollouts": board.on_rollouts} if train is tl.train_grpo else {}
        run = train(model, tokenizer, adapter, nano.task(), settings, on_step=board.on_step, progress=False, **options)
        assert board.curves == {run.method: run.curve(measure)}
        assert board.lengths == {run.method: run.curve("length")}
        assert board.vectors == {run.method: adapter.vectors.flatten().tolist()}
        assert f"step 2 of 2, {measure} {run.curve(measure)[-1]:.3f}" in capsys.readouterr().out
        adapter.detach()


def test_the_runs_of_a_population_are_told_apart(capsys):
    runs = [
        Run("sft", {"steps": 4}, "adapter", 13, "task", steps=[{"step": 1, "loss": loss}], environment={})
        for loss in (2.0, 1.0)
    ]
    board = Dashboard(live=False)
    board.on_step(runs)
    assert board.curves == {"sft, adapter 0": [2.0], "sft, adapter 1": [1.0]}
    assert board.steps == 4
    assert capsys.readouterr().out.count("training: sft") == 1


def test_a_page_of_a_long_run_is_small(widgets):
    board = Dashboard(live=True)
    board.steps = 350
    board.curves["a"], board.lengths["a"], board.vectors["a"] = [0.5] * 350, [300.0] * 350, [0.1] * 100_352
    assert len(board.page()) < 150_000
