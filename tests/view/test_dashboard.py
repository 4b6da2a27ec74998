"""The dashboard: what it draws, what it survives, what it costs."""

import io
import math
import re
import sys
import time
import types
import xml.etree.ElementTree as ElementTree

import pytest
import torch

from tinylora_lite.evaluation.score import Completion, Score
from tinylora_lite.sampling.rollouts import Rollouts
from tinylora_lite.view import dashboard_html
from tinylora_lite.view import notebook as dashboard
from tinylora_lite.view.notebook import Dashboard, has_front_end

BASE = Score(0.25, 0.21, 0.29, 500, 1, ())
HOSTILE = "<script>alert(1)</script> & </pre><img src=x onerror=alert(2)> \u202e\x00\ud800 \\boxed{\"'}"


def rollouts(texts: list[str], prompt_ids=None) -> Rollouts:
    rows = len(texts)
    ids = torch.arange(rows * 3).view(rows, 3) if prompt_ids is None else prompt_ids
    ones, mask = torch.ones(rows, 4), torch.tensor([[1, 1, 0, 0]] * rows)
    return Rollouts(ids, torch.ones_like(ids), ones.long(), mask, ones, ones, torch.tensor([True] * rows), texts)


def fill(board: Dashboard, steps: int = 12, numbers: int = 13) -> Dashboard:
    board.begin("testing: base", 500)
    board.advance(500, 500)
    board.scored("gsm8k, base", BASE)
    board.begin("training: grpo", 20)
    board.steps = 20
    for step in range(1, steps + 1):
        board.rollouts(rollouts(["right", "wrong"]), torch.tensor([[1.0, 0.0]]))
        board.lengths["grpo, rate 1e-04"] = [200.0 + 3 * i for i in range(step)]
        curve = [0.25 + 0.05 * i for i in range(step)]
        board.step("grpo, rate 1e-04", curve, [(-1) ** i * 0.01 * step for i in range(numbers)])
    return board


def parse(page: str) -> ElementTree.Element:
    """The page as XML: whatever was not escaped breaks it."""
    return ElementTree.fromstring(f"<page>{page}</page>")


def text_of(page: str) -> str:
    return " ".join(" ".join(parse(page).itertext()).split())


def numbers_in(page: str) -> list[float]:
    """Every coordinate and length of the drawings."""
    found: list[str] = []
    for element in parse(page).iter():
        for name in ("points", "x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "width", "height", "r"):
            found += re.split(r"[ ,]", element.get(name, "").replace("%", ""))
    return [float(each) for each in found if each]


class Widgets(types.ModuleType):
    """ipywidgets as a test sees it: every picture that would have been sent."""

    def __init__(self, broken: bool = False) -> None:
        super().__init__("ipywidgets")
        sent = self.sent = []

        class HTML:
            def __init__(self) -> None:
                self.__dict__["value"] = ""

            def __setattr__(self, name, value) -> None:
                if broken:
                    raise RuntimeError("comm is closed\nand more")
                sent.append(value)
                self.__dict__[name] = value

        class Box:
            def __init__(self, children=()) -> None:
                self.children, self.selected_index, self.titles = children, 0, {}

            def set_title(self, place, title) -> None:
                self.titles[place] = title

            def close(self) -> None:
                sent.append("closed")

        self.HTML, self.VBox, self.Accordion = HTML, Box, Box


@pytest.fixture
def widgets(monkeypatch):
    pytest.importorskip("IPython")
    made = Widgets()
    monkeypatch.setitem(sys.modules, "ipywidgets", made)
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    made.shown = shown
    return made


def test_what_the_picture_says(widgets):
    board = fill(Dashboard(live=True))
    text = text_of(board.page())
    for part in (
        "training: grpo", "12 of 20", "grpo, rate 1e-04 0.8", "base 0.25", "grpo, rate 1e-04 233",
        "13 numbers, up to ±0.12", "25.0% [21.0%, 29.0%]; n = 500", "1: reward 1, 2 tokens, cut off at the limit",
    ):  # fmt: skip
        assert part in text, part


def test_one_point_of_the_curve_for_each_step(widgets):
    page = fill(Dashboard(live=True)).page()
    lines = [line.get("points").split() for line in parse(page).iter("polyline")]
    assert [len(line) for line in lines] == [12, 12]
    (x0, y0), *_, (x1, y1) = ([float(v) for v in point.split(",")] for point in lines[0])
    assert x1 - x0 == pytest.approx(11 / 19 * (360 - 48), abs=0.2), "12 steps of 20 fill that much of the axis"
    assert y0 - y1 == pytest.approx(0.55 * (150 - 26), abs=0.2), "rewards are drawn from 0 to 1"


def test_bars_show_every_number_on_its_side_of_zero():
    drawn = dashboard_html.bars([0.5, -1.0, 0.0])
    heights = [(float(r.get("y")), float(r.get("height"))) for r in parse(drawn).iter("rect")]
    assert heights == [(27.0, 23.0), (50.0, 46.0), (50.0, 0.0)]


def test_many_numbers_become_columns_that_lose_no_extreme():
    values = [0.0] * 100_352
    values[70_000], values[3] = 2.0, -1.0
    rects = list(parse(dashboard_html.bars(values)).iter("rect"))
    assert len(rects) <= dashboard_html.COLUMNS
    assert max(float(r.get("height")) for r in rects) == 46.0
    assert sorted(float(r.get("height")) for r in rects)[-2] == 23.0
    assert "100,352 trained numbers: 1 above zero, 1 below" in dashboard_html.bars(values)


def test_long_curves_are_thinned_and_keep_their_end():
    values = [i / 5000 for i in range(5000)]
    drawn = dashboard_html.chart({"a": values}, steps=5000, unit="reward", share=True)
    points = next(parse(drawn).iter("polyline")).get("points").split()
    assert len(points) <= dashboard_html.MOST_POINTS + 1
    assert points[-1].startswith("352.0,")


def test_hostile_text_stays_text(widgets):
    tokenizer = types.SimpleNamespace(decode=lambda ids: HOSTILE)
    board = Dashboard(tokenizer, live=True)
    board.begin(HOSTILE, 3)
    board.scored(HOSTILE, BASE)
    board.rollouts(rollouts([HOSTILE, HOSTILE]), torch.tensor([[1.0, 0.0]]))
    board.step(HOSTILE, [0.5, 0.6], [0.1])
    page = board.page()
    assert not re.search(r"<(script|img)", page)
    assert page.count("&lt;script&gt;") >= 6
    assert "</pre><img" not in page
    parse(page)
    page.encode("utf-8")
    assert board.trouble is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_a_gap_and_said_in_words(widgets, bad):
    board = Dashboard(live=True)
    board.steps = 5
    board.lengths["a"] = [bad, 20.0, bad]
    board.step("a", [0.1, bad, 0.3, 0.4, bad], [0.1, bad, -0.2])
    board.scored("a", Score(bad, bad, bad, 3, 1, ()))
    board.rollouts(rollouts(["x", "y"]), torch.tensor([[bad, 0.0]]))
    page = board.page()
    assert board.trouble is None
    assert all(math.isfinite(number) for number in numbers_in(page))
    assert [len(line.get("points").split()) for line in parse(page).iter("polyline")] == [2]
    assert "1 not finite" in page
    assert ("not a number" if math.isnan(bad) else "infinite") in page


def test_nothing_at_all_can_be_drawn(widgets):
    text = text_of(Dashboard(live=True).page())
    assert "not evaluated yet" in text
    assert "nothing yet" in text


def test_losses_below_zero_and_above_one_stay_inside(widgets):
    board = Dashboard(live=True, measure="loss")
    board.step("sft", [3.5, 2.0, -0.5], [])
    heights = [float(point.split(",")[1]) for point in next(parse(board.page()).iter("polyline")).get("points").split()]
    assert heights[0] == 8.0
    assert heights[-1] == 132.0
    assert "loss of each step" in board.page()


def test_groups_that_disagree_are_shown_first(widgets):
    board = Dashboard(live=True)
    texts = [f"answer {i}" for i in range(16)]
    rewards = torch.tensor([[1.0] * 4, [0.0] * 4, [0.0, 1.0, 0.0, 0.0], [0.0] * 4])
    board.rollouts(rollouts(texts), rewards)
    shown = re.findall(r"answer \d+", board.page())
    assert shown == [f"answer {i}" for i in (8, 9, 10, 11, 0, 1, 2, 3)]


def test_the_prompt_is_decoded_without_its_padding(widgets):
    seen = []
    tokenizer = types.SimpleNamespace(decode=lambda ids: seen.append(ids.tolist()) or "Question")
    one = rollouts(["x"], torch.tensor([[0, 0, 7, 8]]))
    one.prompt_mask[0, :2] = 0
    board = Dashboard(tokenizer, live=True)
    board.rollouts(one, torch.tensor([[1.0]]))
    assert seen == [[7, 8]]
    assert "Question" in board.page()


def test_pictures_are_sent_once_a_second_at_most(widgets, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    board = Dashboard(live=True)
    for step in range(100):
        now[0] += 0.1
        board.step("a", [0.5] * (step + 1), [0.1])
    assert 9 <= len(widgets.sent) <= 11


def test_time_left_counts_from_where_a_run_was_taken_up(widgets, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    board = Dashboard(live=True)
    board.begin("training", 100)
    now[0] = 50.0  # loading a checkpoint
    board.step("a", [0.5] * 60, [])
    now[0] = 250.0
    board.step("a", [0.5] * 80, [])
    assert "about 3 min left" in text_of(board.page()), "20 steps took 200 s, and 20 are left"


def test_a_broken_front_end_is_said_once_and_ends_in_lines(monkeypatch, capsys):
    pytest.importorskip("IPython")
    monkeypatch.setitem(sys.modules, "ipywidgets", Widgets(broken=True))
    monkeypatch.setattr("IPython.display.display", lambda shown: None)
    with Dashboard(live=True) as board:
        fill(board, steps=3)
    out = capsys.readouterr().out
    assert out.count("The dashboard stopped, training goes on (RuntimeError: comm is closed).") == 1
    assert "step 3 of 20, reward 0.350" in out


def test_broken_rollouts_never_reach_training(widgets, capsys):
    board = Dashboard(live=True)
    board.rollouts(None, None)
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
    left = widgets.shown[-1]
    assert "done" in text_of(left.data)
    assert "<details" in left.data


def test_an_interruption_leaves_the_phase_that_it_met(widgets):
    board = fill(Dashboard(live=True))
    board.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert "training: grpo" in text_of(widgets.shown[-1].data)


def test_no_one_looks_at_a_test_or_at_a_notebook_that_a_program_runs(monkeypatch):
    for name in dashboard.FRONT_ENDS:
        monkeypatch.delenv(name, raising=False)
    assert not has_front_end()
    monkeypatch.setenv("JPY_SESSION_NAME", "book.ipynb")
    assert not has_front_end(), "a variable alone is no kernel"


def test_the_lenient_score_stands_beside_the_strict_one():
    row = Completion("p", "1", "1", 0.0, 3, False, lenient=1.0, formatted=False)
    drawn = dashboard_html.score_row("base", Score.of([row]))
    assert "0.0% [" in drawn
    assert "lenient 100.0%" in drawn


def test_it_works_with_the_real_widgets(monkeypatch):
    pytest.importorskip("ipywidgets")
    pytest.importorskip("IPython")
    monkeypatch.setattr("sys.stdout", io.StringIO())
    with Dashboard(live=True) as board:
        fill(board, steps=2)
        view = board._view
        assert view._samples.children[0].value.count("<pre") == 1
        assert view._samples.get_title(0).startswith("1: reward 1")
        view.show("x")
        assert view._picture.value == "x"
    assert board.trouble is None


def test_slow_pictures_are_drawn_less_often(widgets, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    board = Dashboard(live=True)

    def slow_picture() -> str:
        now[0] += 0.2
        return "picture"

    monkeypatch.setattr(board, "_picture", slow_picture)
    for step in range(2000):
        now[0] += 0.1
        board.step("a", [0.5] * (step + 1), [0.1])
    drawn = widgets.sent.count("picture")
    assert drawn * 0.2 <= 0.012 * (now[0] - 100)
    assert drawn >= 9


def test_a_picture_of_a_long_run_is_quick_and_small(widgets):
    board = Dashboard(live=True)
    board.steps = 350
    board.curves["a"], board.lengths["a"], board.vectors["a"] = [0.5] * 350, [300.0] * 350, [0.1] * 196
    times = []
    for _ in range(10):
        start = time.perf_counter()
        page = board._picture()
        times.append(time.perf_counter() - start)
    print(f"a picture: {1000 * min(times):.1f} ms, {len(page):,} characters")
    assert min(times) < 0.05
    assert len(page) < 60_000
