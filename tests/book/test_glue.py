"""Values for the text of a chapter, and its tables."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from tinylora_lite.book.glue import put, put_percent, table
from tinylora_lite.lab.claims import rl_parameters as rl
from tinylora_lite.lab.estimate import Estimate
from tinylora_lite.lab.statistics import difference


@pytest.fixture
def glued(monkeypatch) -> dict:
    found: dict = {}

    def glue(name, value, display):
        assert not display
        found[name] = value

    monkeypatch.setitem(sys.modules, "myst_nb", SimpleNamespace(glue=glue))
    return found


def test_names_are_of_prefix_and_key(glued):
    put("hb", {"bits": 208, 13: np.float64(0.5), "": "34, 35 and 36"})
    assert glued == {"hb_bits": 208, "hb_13": 0.5, "hb": "34, 35 and 36"}
    assert type(glued["hb_13"]) is float


def test_a_share_is_one_number_and_an_estimate_three(glued):
    put_percent("hb", {"paper": 0.5, "full": Estimate(0.25, 0.125, 0.375, (0.25,)), "": Estimate(0, -1, 1, (0,))})
    assert glued == {"hb_paper": 50} | {
        f"{name}_{part}": value
        for name, values in (("hb_full", (25, 12.5, 37.5)), ("hb", (0, -100, 100)))
        for part, value in zip(("mean", "low", "high"), values, strict=True)
    }


def test_points_are_estimated_and_pairs_compared_by_the_stores_score(glued, store, greedy):
    put_percent("bu", {"13": rl.THIRTEEN, "gain": (rl.THIRTEEN, rl.BASE)}, greedy)
    assert glued["bu_13_mean"] == 100 * rl.THIRTEEN.estimate(greedy).mean
    assert glued["bu_gain_low"] == 100 * difference(rl.THIRTEEN, rl.BASE, greedy).low
    put_percent("bu", {"13": rl.THIRTEEN}, store)
    assert glued["bu_13_mean"] == 100 * rl.THIRTEEN.estimate(store).mean


def test_outside_the_book_values_go_nowhere(monkeypatch):
    monkeypatch.setitem(sys.modules, "myst_nb", None)
    put_percent("hb", {"paper": 0.9})


def test_a_table_is_aligned_and_an_empty_cell_stays_empty():
    shown = table(("base", "bits"), "lr", [("", 208), ("all", f"{10_000:,}")])
    assert shown == "| base | bits |\n|---|---:|\n|  | 208 |\n| all | 10,000 |"
    assert shown._repr_markdown_() == shown
