"""Progress on a terminal and in a log."""

import io
import math
import time

import pytest
from rich.console import Console, Group

from tinylora_lite.evaluation.score import Completion, Score
from tinylora_lite.view.progress import LiveProgress, PlainProgress, Progress, progress_for, score_table, sparkline

BASE = Score(0.25, 0.21, 0.29, 500, 1, ())
BETTER = Score(0.8, 0.76, 0.83, 500, 1, ())


def fill(progress: Progress) -> Progress:
    progress.steps = 20
    progress.begin("testing: base", 500)
    progress.scored("base", BASE)
    progress.begin("training: calibrated P", 20)
    for step in range(12):
        progress.step("random", [0.25] * (step + 1), [0.01 * step] * 13)
        rising = [0.25 + 0.05 * i for i in range(step + 1)]
        progress.step("calibrated", rising, [(-1) ** i * 0.1 for i in range(13)])
    progress.scored("calibrated", BETTER)
    return progress


def drawn(progress: LiveProgress, width: int = 100) -> str:
    """What the display shows while it is live."""
    return printed(Group(progress.bar, progress), width)


def printed(shown, width: int = 100) -> str:
    console = Console(record=True, width=width, file=io.StringIO())
    console.print(shown)
    return console.export_text()


@pytest.mark.parametrize("width", [40, 60, 100, 200])
@pytest.mark.parametrize("empty", [True, False])
def test_the_display_fits(width, empty):
    progress = LiveProgress(Console())
    lines = drawn(progress if empty else fill(progress), width).splitlines()
    assert max(map(len, lines)) <= width
    assert len(lines) <= 20


@pytest.mark.parametrize("width", [80, 120])
def test_what_the_display_says(width):
    text = drawn(fill(LiveProgress(Console())), width)
    parts = ("reward 0.25", "reward 0.80", "±0.1", "training: calibrated P", "12/20", "25.0% [21.0%, 29.0%], n = 500")
    for part in parts:
        assert part in text


def test_after_the_end_the_results_are_printed_without_the_phase():
    text = printed(fill(LiveProgress(Console())))
    assert "reward 0.80" in text
    assert "training" not in text


def test_scores_are_shown_once_there_are_some():
    """A command that evaluates nothing, such as export, shows no empty table."""
    progress = LiveProgress(Console())
    progress.begin("writing")
    assert "evaluated" not in drawn(progress)
    assert "pass@1" not in drawn(progress)
    assert "pass@1" in drawn(fill(progress))


def test_more_runs_than_colours():
    """As in a sweep over learning rates."""
    progress = LiveProgress(Console())
    for rate in range(5):
        progress.step(f"rate {rate}", [0.5], [0.1])
    assert "rate 4" in drawn(progress)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_ends_nothing(bad):
    progress = LiveProgress(Console())
    progress.step("a", [0.5, bad], [bad, 0.1])
    progress.scored("b", Score(0.5, -bad, bad, 1, 1, ()))
    assert "a" in drawn(progress)


def test_a_loss_is_called_a_loss_and_fills_its_own_scale():
    progress = LiveProgress(Console())
    progress.measure, progress.steps = "loss", 3
    progress.step("sft", [3.0, 1.5, 0.0], [])
    (line,) = (line for line in drawn(progress).splitlines() if "sft" in line)
    assert "█▅▁" in line
    assert "loss 0.00" in line


@pytest.mark.parametrize(
    ("values", "width", "length", "expected"),
    [
        ([0.0, 0.5, 1.0], 3, 0, "▁▅█"),
        ([0.0, 0.5, 1.0], 9, 6, "▁▅█   "),
        ([0.0, 0.0, 1.0, 1.0], 2, 0, "▁█"),
        ([0.0, 1.0, 0.0, 1.0], 2, 0, "▅▅"),
        ([0.0, math.nan, 1.0], 3, 0, "▁ █"),
        ([], 5, 0, ""),
    ],
)
def test_sparkline(values, width, length, expected):
    assert sparkline(values, width, (0.0, 1.0), length) == expected


def test_a_value_outside_the_scale_widens_it():
    assert sparkline([-1.0, 1.0], 2, (0.0,)) == "▁█"
    assert sparkline([0.0, 0.0], 2, ()) == "▁▁"


def test_the_interval_is_drawn_from_0_to_100():
    text = printed(score_table({"none": Score(0.0, 0.0, 0.0, 1, 1, ()), "all": Score(1.0, 0.5, 1.0, 1, 1, ())}))
    assert "●············" in text
    assert "······━━━━━━●" in text


def test_the_lenient_score_is_beside_the_strict_one():
    row = Completion("p", "1", "1", 0.0, 3, False, lenient=1.0, formatted=False)
    text = printed(score_table({"base": Score.of([row])}))
    assert "0.0% [" in text
    assert "lenient 100.0%" in text


def test_plain_lines():
    stream = io.StringIO()
    fill(PlainProgress(stream))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2 + 2 + 24
    assert lines[-1].endswith("calibrated: pass@1 80.0% [76.0%, 83.0%], n = 500")
    assert "random: step 12 of 20, reward 0.250" in lines[-3]
    assert "\x1b" not in stream.getvalue()


def test_a_log_gets_lines_in_a_long_phase_and_few(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    progress = PlainProgress(stream := io.StringIO())
    progress.begin("testing: base", 1000)
    for done in range(1, 1001):
        now[0] += 0.1
        progress.advance(done, 1000)
    lines = stream.getvalue().splitlines()
    assert 4 <= len(lines) <= 5
    assert lines[1].endswith("300 of 1,000")


def test_plain_lines_leave_stdout_to_the_result(capsys):
    fill(PlainProgress())
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "training: calibrated P" in captured.err


def test_time_left_counts_from_where_a_run_was_taken_up():
    progress, now = Progress(), [0.0]
    progress.bar.get_time = lambda: now[0]
    progress.begin("training", 100)
    now[0] = 50.0  # loading a checkpoint
    progress.step("a", [0.5] * 60, [])
    now[0] = 250.0
    progress.step("a", [0.5] * 80, [])
    assert progress.bar.tasks[0].time_remaining == 200, "20 steps took 200 s, and 20 are left"


@pytest.mark.parametrize(
    ("options", "plain", "live"),
    [
        ({"force_terminal": True}, False, True),
        ({"force_terminal": True}, True, False),
        ({"force_terminal": False}, False, False),
        ({"force_terminal": True, "_environ": {"TERM": "dumb"}}, False, False),
    ],
)
def test_who_gets_the_display(options, plain, live):
    console = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), **options)
    assert isinstance(progress_for(console, plain), LiveProgress) is live


def test_a_terminal_that_lacks_the_characters_gets_lines():
    console = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="latin-1"), force_terminal=True)
    assert isinstance(progress_for(console), PlainProgress)


def test_the_live_display_gives_the_cursor_back_after_an_interruption():
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=80, height=30)

    def interrupted() -> None:
        with LiveProgress(console) as progress:
            fill(progress)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    hide, show = "\x1b[?25l", "\x1b[?25h"
    assert stream.getvalue().rindex(show) > stream.getvalue().rindex(hide)
