"""The book's figures: they say what the numbers say, in words for those who do not see them, on any ground."""

import builtins
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from tinylora_lite.utils.record import Run
from tinylora_lite.view import plot

PAGES = {"light": "#ffffff", "dark": "#14181e"}


def run(rewards: list[float], seed: int = 0) -> Run:
    steps = [{"step": step + 1, "reward": reward} for step, reward in enumerate(rewards)]
    return Run("grpo", {"seed": seed}, "adapter", 13, "task", steps=steps)


def row(method: str, parameters: int, accuracy: float) -> dict:
    return {"method": method, "parameters": parameters, "accuracy": accuracy, "low": accuracy - 0.02,
            "high": accuracy + 0.04}  # fmt: skip


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
@pytest.mark.parametrize("method", [name for name in plot.METHODS if name != "base"])
def test_every_colour_stands_out_in_light_and_dark(method, page, contrast):
    assert contrast(plot.METHODS[method].colour, page) >= 3


def test_methods_differ_without_colour():
    looks = [(look.marker, look.line) for look in plot.METHODS.values()]
    assert len(set(looks)) == len(looks)


def test_ink_follows_the_page():
    drawn, axes = plot.figure()
    axes.plot([0, 1], [0, 1], color=plot.METHODS["lora"].colour)
    axes.set_title("title")
    svg = plot.show(drawn, "a line").svg
    colours = set(re.findall(r"#[0-9a-fA-F]{6}", svg))
    assert colours == {plot.METHODS["lora"].colour.lower()}
    assert "currentColor" in svg
    assert "DejaVu" not in svg


def test_alternative_text_is_escaped_and_required():
    drawn, _ = plot.figure()
    shown = plot.show(drawn, 'a < b & "c"')
    root = ElementTree.fromstring(shown._repr_html_())
    assert root.get("role") == "img"
    assert root.get("aria-label") == 'a < b & "c"'
    assert 'a < b & "c"' in repr(shown)
    with pytest.raises(ValueError, match="alternative text"):
        plot.show(drawn, " ")


def test_two_figures_on_a_page_share_no_identifier_and_a_build_repeats_itself():
    def identifiers(alt: str) -> set[str]:
        drawn, axes = plot.figure()
        axes.plot([0, 1], [0, 1], "o")
        return set(re.findall(r'\bid="([^"]+)"', plot.show(drawn, alt).svg))

    assert identifiers("one")
    assert identifiers("one") == identifiers("one")
    assert not identifiers("one") & identifiers("two")


@pytest.mark.parametrize(
    ("number", "said"),
    [(1, "1"), (13, "13"), (196, "196"), (1000, "1 k"), (100_000, "100 k"), (2_523_136, "2.5 M"), (1e10, "10 G")],
)
def test_counts_in_words(number, said):
    assert plot.human(number) == said


def test_learning_curves_draw_every_seed_and_their_mean(texts):
    drawn = plot.learning_curves([plot.Curves("tinylora", [run([0, 1, 2, 3]), run([2, 3, 4])])], base=0.5)
    first, second, mean, base = drawn.axes[0].lines
    assert list(first.get_ydata()) == [0, 1, 2, 3]
    assert list(second.get_ydata()) == [2, 3, 4]
    assert list(mean.get_xdata()) == [1, 2, 3]
    assert list(mean.get_ydata()) == [1, 2, 3]
    assert mean.get_linewidth() > 2 * first.get_linewidth()
    assert set(base.get_ydata()) == {0.5}
    assert {"TinyLoRA", "untrained base", "step", "mean reward"} <= set(texts(drawn))


def test_a_curve_has_its_own_label(texts):
    drawn = plot.learning_curves([plot.Curves("full", [run([0])], "every weight")])
    assert "every weight" in texts(drawn)


def test_labels_at_the_right_keep_apart():
    curves = [
        plot.Curves(name, [run([0.0, 0.9 + 0.001 * i, 1.0])]) for i, name in enumerate(("lora", "full", "tinylora"))
    ]
    drawn = plot.learning_curves(curves)
    heights = sorted({note.xy[1] for note in drawn.axes[0].texts})
    assert len(heights) == 3
    assert min(np.diff(heights)) >= 0.08
    assert max(heights) <= 1


def test_accuracy_against_numbers(texts):
    rows = [row("tinylora", 196, 0.6), row("base", 0, 0.25), row("tinylora", 13, 0.4), row("full", 1_200_000, 0.9)]
    drawn = plot.accuracy_against_numbers(rows, ylabel="accuracy")
    (axes,) = drawn.axes
    assert axes.get_xscale() == "log"
    curve = next(line for line in axes.lines if list(line.get_xdata()) == [13, 196])
    assert list(curve.get_ydata()) == [0.4, 0.6]
    assert curve.get_color() == plot.METHODS["tinylora"].colour
    (low, high) = axes.collections[0].get_segments()[0][:, 1]
    assert (low, high) == pytest.approx((0.38, 0.44))
    assert {"1", "13", "1 k", "1 M", "TinyLoRA", "all weights", "untrained base"} <= set(texts(drawn))


def test_counts_are_written_out(texts):
    drawn = plot.counts([("lora", "LoRA, rank 1", 2_523_136), ("tinylora", "n_tie = 16", 13)])
    assert {"2,523,136", "13", "LoRA, rank 1", "n_tie = 16"} <= set(texts(drawn))
    assert drawn.axes[0].get_xscale() == "log"


def heights(values: list[float]) -> list[tuple[float, float]]:
    _, axes = plot.figure()
    plot.bars(axes, values, plot.INK)
    return [(bar.get_y(), bar.get_height()) for bar in axes.patches]


def test_bars_show_every_value_on_its_side_of_zero():
    assert heights([0.5, -1.0, 0.0]) == [(0.0, 0.5), (-1.0, 1.0), (0.0, 0.0)]
    assert heights([np.nan, np.inf, 0.5]) == [(0.0, 0.0), (0.0, 0.0), (0.0, 0.5)]


def test_many_bars_share_columns_that_lose_no_extreme():
    values = [0.0] * 100_352
    values[70_000], values[3] = 2.0, -1.0
    columns = heights(values)
    assert len(columns) == 200
    assert sorted(columns)[0] == (-1.0, 1.0)
    assert sorted(columns)[-1] == (0.0, 2.0)


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    real = builtins.__import__

    def no_matplotlib(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    with pytest.raises(ModuleNotFoundError, match=re.escape('pip install "tinylora_lite[lab]"')):
        plot.figure()
