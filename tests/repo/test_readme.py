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
from tinylora_lite.lab.registered import over_sums, paired, primary
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


def test_the_table_on_real_models_is_the_records():
    store = Store(REAL_RESULTS)
    lenient, rows = store.scored("greedy", "lenient"), {UNTRAINED: [], PROMPTED: [], THIRTEEN: []}
    gains, leads, words = [], [], []
    for name, seeds, best in (("real-smollm2", 5, "words-1, four shown"), ("real-qwen", 3, "words-2, eight shown")):
        points = points_of(claim_of(name))
        bare, prompted, thirteen = (points[label] for label in rows)
        assert prompted.rate(store) == best
        rows[UNTRAINED] += [f"{bare.accuracies(lenient)[0]:.1%}"]
        rows[PROMPTED] += [f"{prompted.accuracies(lenient)[0]:.1%}"]
        found = Estimate.of(thirteen.accuracies(lenient))
        assert len(found.values) == seeds
        rows[THIRTEEN] += [f"{found.mean:.1%} [{found.low:.1%}, {found.high:.1%}]"]
        gains += [measure(thirteen, bare, store).as_points() for measure in (paired, over_sums)]
        leads.append(over_sums(thirteen, prompted, store))
        words.append(primary(thirteen, bare, store)[0])
        assert min(paired(thirteen, bare, store).values) > 0, "all draws gain"
    assert words == ["They help", "Undecided"]
    assert all(lead.low < 0 < lead.high for lead in leads), "no difference to the best prompt is shown"
    shown = " on SmolLM2 and\n".join(lead.as_points() for lead in leads)
    assert f"thirteen numbers against it gain {shown} on Qwen2.5-Coder" in README
    for label, (one, other) in zip(
        (
            "untrained",
            "untrained, best of five prompts (four and eight worked examples)",
            "13 numbers, random directions",
        ),
        rows.values(),
        strict=True,
    ):
        assert f"| {label} | {one} | {other} |" in README
    assert f"gain {gains[0]} over draws of P" in README
    assert f"ask for {gains[1]}; on Qwen2.5-Coder {gains[2]} and\n{gains[3]}." in README


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
