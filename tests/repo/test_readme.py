"""The README's figures are those of the committed records; what it and CONTRIBUTING name exists."""

import json
import re
from pathlib import Path

import tinylora_lite as tl
from tinylora_lite.lab import study

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_of_accuracies_is_the_records():
    rows = {
        "untrained": study.run_base()["sampled"],
        "13 numbers, random directions": study.over_seeds(study.seeds_of(study.PAPER)),
        "13 numbers, calibrated directions": study.over_seeds(study.seeds_of(study.CALIBRATED)),
        "all 1.2 million weights": study.over_seeds(study.seeds_of(study.ALL)),
    }
    for name, score in rows.items():
        interval = f"{score['accuracy']:.1%} [{score['low']:.1%}, {score['high']:.1%}]"
        assert f"| {name} | {interval} |" in README


def test_the_demo_s_time_is_its_record_s():
    record = json.loads((study.RESULTS / study.nano.BASE / "demo.json").read_text(encoding="utf-8"))
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
