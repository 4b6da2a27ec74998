"""The drawings of matrices and of tying name every part."""

import pytest

pytest.importorskip("matplotlib")

from book import structure
from tinylora_lite.adapter.tying import TargetModule, groups_of
from tinylora_lite.book import diagrams
from tinylora_lite.view import plot


@pytest.mark.parametrize("tone", [*diagrams.TONES, structure.PAPER])
def test_words_on_a_coloured_ground_can_be_read(tone, contrast):
    assert contrast(plot.BLACK, tone) >= 4.5


def test_matrices_name_every_factor(texts):
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
