"""The drawings of matrices and of tying name every part."""

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from book import structure
from tinylora_lite.adapter.tying import TargetModule, groups_of
from tinylora_lite.book import diagrams
from tinylora_lite.view import plot


def texts(drawn) -> list[str]:
    root = ElementTree.fromstring(plot.show(drawn, "a figure under test").svg)
    return [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]


def contrast(one: str, other: str) -> float:
    """Of two colours, as WCAG 2 defines it."""

    def luminance(colour: str) -> float:
        parts = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("tone", [*diagrams.TONES, structure.PAPER])
def test_words_on_a_coloured_ground_can_be_read(tone):
    assert contrast(plot.BLACK, tone) >= 4.5


def test_matrices_name_every_factor():
    words = texts(diagrams.matrices())
    assert words.count("W") == 3
    assert {"A", "B", "R", "U", "Σ", "Vᵀ", "P₁", "v₁", "in", "out", "r"} <= set(words)


@pytest.mark.parametrize(("n_tie", "tying", "numbers"), [(4, "tiled", 13), (4, "structured", 14)])
def test_the_map_shows_each_module_under_its_number(n_tie, tying, numbers):
    groups = groups_of([TargetModule(layer, kind, "") for layer in range(7) for kind in range(7)], n_tie, tying)
    drawn = diagrams.tying_map(groups, list("abcdefg"))
    squares = [text for text in drawn.axes[0].texts if text.get_position()[1] >= 0]
    shown = {tuple(text.get_position()): int(text.get_text()) for text in squares}
    assert shown == {(place // 7, place % 7): group + 1 for place, group in enumerate(groups)}
    assert len(drawn.axes[0].texts) - len(squares) == numbers
