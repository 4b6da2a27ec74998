"""The README's figures are those of the committed records; what it and CONTRIBUTING name exists."""

import json
import re
from pathlib import Path

import tinylora_lite as tl
from tinylora_lite import nano
from tinylora_lite.book.real import PROMPTED, THIRTEEN, UNTRAINED, points_of
from tinylora_lite.lab import untrained
from tinylora_lite.lab.claims import chapters, claim_of
from tinylora_lite.lab.estimate import Estimate
from tinylora_lite.lab.registered import over_sums, paired
from tinylora_lite.lab.store import CHAPTERS, REAL_RESULTS, Store

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_of_accuracies_is_the_records():
    store, controls = Store(CHAPTERS), untrained.recorded()
    plain = {
        "untrained": chapters.BASE.records(store)[0]["scores"]["sampled"],
        "untrained, the answer's first token held to a number": controls["first_token"]["sampled"],
        "untrained, with its best line of prompt": controls["header"]["sampled"],
    }
    rows = {name: (found["accuracy"], found["low"], found["high"]) for name, found in plain.items()}
    for name, point in (
        ("13 numbers, random directions", chapters.PAPER),
        ("13 numbers, calibrated directions", chapters.CALIBRATED),
        ("all 1.2 million weights", chapters.ALL),
    ):
        found = point.estimate(store)
        rows[name] = (found.mean, found.low, found.high)
    for name, (accuracy, low, high) in rows.items():
        assert f"| {name} | {accuracy:.1%} [{low:.1%}, {high:.1%}] |" in README
    greedy = [controls[name]["greedy"]["accuracy"] for name in ("first_token", "header")]
    assert f"the second row has {greedy[0]:.1%} and the third {greedy[1]:.1%}" in README


def test_the_table_on_a_real_model_is_the_records():
    claim, store = claim_of("real-smollm2"), Store(REAL_RESULTS)
    points = points_of(claim)
    bare_point, prompted, thirteen = (points[label] for label in (UNTRAINED, PROMPTED, THIRTEEN))
    bare, asked = (point.records(store)[0]["scores"]["greedy"]["lenient"] for point in (bare_point, prompted))
    assert f"| untrained | {bare:.1%} |" in README
    assert f"| untrained, the best of five prompts (four worked examples) | {asked:.1%} |" in README
    assert prompted.rate(store) == "words-1, four shown"
    found = Estimate.of([record["scores"]["greedy"]["lenient"] for record in thirteen.records(store)])
    assert len(found.values) == 5
    row = f"{found.mean:.1%} [{found.low:.1%}, {found.high:.1%}]"
    assert README.count(f"| 13 numbers, random directions | {row} |") == 1
    assert f"gain {paired(thirteen, bare_point, store).as_points()} over draws of P" in README
    assert f"ask for {over_sums(thirteen, bare_point, store).as_points()}" in README
    assert over_sums(thirteen, prompted, store).low < 0 < over_sums(thirteen, prompted, store).high


def test_the_demo_s_time_is_its_record_s():
    record = json.loads((CHAPTERS / nano.BASE / "demo.json").read_text(encoding="utf-8"))
    assert f"{record['seconds']:.0f} seconds" in README
    assert record["seconds"] < 180


def test_every_name_it_shows_exists():
    names = set(re.findall(r"\btl\.(\w+)", README))
    assert names
    assert not [name for name in names if not hasattr(tl, name)]


def test_every_file_in_the_table_of_rooms_exists():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text.partition("## Where something new goes")[2].partition("\n## ")[0]
    named = re.findall(r"`(\w+/[\w./]*)`", table)
    assert {name.partition("/")[0] for name in named} >= {"adapter", "sampling", "tasks", "training", "lab", "book"}
    assert not [name for name in named if not (ROOT / "tinylora_lite" / name).exists() and not (ROOT / name).exists()]
