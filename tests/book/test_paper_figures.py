"""The figures of *Reading the paper closely* show the numbers that they are given, and nothing that is not known."""

import doctest

import pytest
from scipy import stats

pytest.importorskip("matplotlib")

from tinylora_lite.book import paper_figures
from tinylora_lite.book.published import Published, load_published


@pytest.fixture(scope="module")
def published() -> list[Published]:
    return load_published()


def points(axes, marker: str) -> set[tuple[float, float]]:
    own = [line.get_data() for line in axes.lines if line.get_marker() == marker]
    return {(float(x), float(y)) for xs, ys in own for x, y in zip(xs, ys, strict=True)}


def replication(published: list[Published]) -> list[Published]:
    return [row for row in published if "a79151e" in row.source.title and row.method == "TinyLoRA"]


def test_worked_example():
    assert doctest.testmod(paper_figures) == (0, 1)


@pytest.mark.parametrize(("right", "n"), [(0, 30), (5, 30), (1183, 1319)])
def test_wilson_is_scipys(right, n):
    expected = stats.binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert paper_figures.wilson(right / n, n) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_figure_1_holds_every_point_and_every_level(published, texts):
    paper = [row for row in published if row.where == "figure 1"]
    repeated = replication(published)
    drawn = paper_figures.accuracy_against_numbers(paper, repeated, {"a level": 0.756})
    expected = {(row.parameters, row.value) for row in paper if row.method == "TinyLoRA"}
    expected |= {(row.parameters, row.value) for row in repeated}
    assert points(drawn.axes[0], "o") == expected
    assert {"a level", "LoRA", "LoRA-XS", "TinyLoRA, paper"} <= set(texts(drawn))


def test_an_unknown_number_of_problems_has_no_interval():
    axes = paper_figures.untrained([("known", 0.9, 1319), ("unknown", 0.7, None)]).axes[0]
    bars = [line for line in axes.lines if len(line.get_xdata()) == 2]
    assert [tuple(line.get_ydata()) for line in bars] == [(0, 0)]
    assert tuple(bars[0].get_xdata()) == pytest.approx(paper_figures.wilson(0.9, 1319))


def test_bytes_are_the_count_times_the_size_of_a_number(published):
    rows = [row for row in published if row.where == "figure 4"]
    panels = paper_figures.bytes_of_numbers(rows).axes
    for panel, tying in zip(panels[::2], ("tiled", "structured"), strict=True):
        for marker, precision in (("o", "fp32"), ("D", "bf16")):
            own = {(r.parameters, r.value) for r in rows if (r.tying, r.precision) == (tying, precision)}
            assert points(panel, marker) == own
    for panel, tying in zip(panels[1::2], ("tiled", "structured"), strict=True):
        for marker, precision, size in (("o", "fp32", 4), ("D", "bf16", 2)):
            own = {(size * r.parameters, r.value) for r in rows if (r.tying, r.precision) == (tying, precision)}
            assert points(panel, marker) == own


def test_both_readings_and_the_paper_are_told_apart(published):
    paper = [row for row in published if row.where == "figure 8" and row.model.startswith("Qwen")]
    grid = [row for row in published if "with PEFT" in row.source.title and row.method == "TinyLoRA"]
    axes = paper_figures.strict_and_lenient(paper, grid).axes[0]
    assert points(axes, "o") == {(row.parameters, row.value) for row in paper}
    for marker, scoring in (("v", "strict"), ("s", "lenient")):
        own = [row for row in grid if row.scoring == scoring]
        assert len(own) == 16
        assert points(axes, marker) == {(row.parameters, row.value) for row in own}
