"""Progress on a terminal and in a log."""

import io

import pytest
from rich.console import Console

from tinylora_lite.evaluation.score import Score
from tinylora_lite.view.braille import Canvas
from tinylora_lite.view.progress import LiveProgress, PlainProgress, Progress, picture, progress_for

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


def drawn(progress: Progress, width: int, height: int = 40) -> str:
    console = Console(record=True, width=width, height=height, file=io.StringIO())
    console.print(picture(progress, width, height))
    return console.export_text()


@pytest.mark.parametrize("width", [40, 60, 100, 120, 200])
@pytest.mark.parametrize("empty", [True, False])
def test_the_picture_fits(width, empty):
    progress = Progress() if empty else fill(Progress())
    lines = drawn(progress, width).splitlines()
    assert max(map(len, lines)) <= width
    assert len(lines) <= 40


@pytest.mark.parametrize("width", [60, 120])
def test_what_the_picture_says(width):
    text = drawn(fill(Progress()), width)
    for part in (
        "random 0.25",
        "calibrated 0.80",
        "25.0",
        "21-29",
        "76-83",
        "training: calibrated P",
        "12/20",
        "step 20",
    ):
        assert part in text


def test_a_small_terminal_does_without_the_bars():
    assert "v of" in drawn(fill(Progress()), 80, 50)
    small = drawn(fill(Progress()), 80, 20)
    assert "v of" not in small
    assert len(small.splitlines()) <= 20


def test_plain_lines():
    stream = io.StringIO()
    fill(PlainProgress(stream))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2 + 2 + 24
    assert lines[-1].endswith("calibrated: pass@1 80.0% [76.0%, 83.0%], n = 500")
    assert "random: step 12 of 20, reward 0.250" in lines[-3]
    assert "\x1b" not in stream.getvalue()


@pytest.mark.parametrize(
    ("options", "plain", "live"),
    [
        ({"force_terminal": True}, False, True),
        ({"force_terminal": True}, True, False),
        ({"force_terminal": False}, False, False),
        ({"force_terminal": True, "_environ": {"TERM": "dumb"}}, False, False),
    ],
)
def test_who_gets_the_picture(options, plain, live):
    console = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), **options)
    assert isinstance(progress_for(console, plain), LiveProgress) is live


def test_a_terminal_without_braille_gets_lines():
    console = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="latin-1"), force_terminal=True)
    assert isinstance(progress_for(console), PlainProgress)


def test_the_live_picture_gives_the_cursor_back_after_an_interruption():
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


def test_dots():
    canvas = Canvas(2, 1)
    canvas.line(0, 0, 3, 3)
    assert [row.plain for row in canvas.rows()] == ["⠑⢄"]
    canvas.dot(99, -1)
    assert [row.plain for row in canvas.rows()] == ["⠑⢄"]
