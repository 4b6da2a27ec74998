"""The README's figures are those of the committed records, and what it shows can be called."""

import json
import re
from pathlib import Path

import tinylora_lite as tl
from tinylora_lite.lab import study, untrained

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_of_accuracies_is_the_records():
    controls = untrained.recorded()
    rows = {
        "untrained": study.run_base()["sampled"],
        "untrained, the answer's first token held to a number": controls["first_token"]["sampled"],
        "untrained, with its best line of prompt": controls["header"]["sampled"],
        "13 numbers, random directions": study.over_seeds(study.seeds_of(study.PAPER)),
        "13 numbers, calibrated directions": study.over_seeds(study.seeds_of(study.CALIBRATED)),
        "all 1.2 million weights": study.over_seeds(study.seeds_of(study.ALL)),
    }
    for name, score in rows.items():
        interval = f"{score['accuracy']:.1%} [{score['low']:.1%}, {score['high']:.1%}]"
        assert f"| {name} | {interval} |" in README
    greedy = [controls[name]["greedy"]["accuracy"] for name in ("first_token", "header")]
    assert f"the second row has {greedy[0]:.1%} and the third {greedy[1]:.1%}" in README


def test_the_demo_s_time_is_its_record_s():
    record = json.loads((study.RESULTS / study.nano.BASE / "demo.json").read_text(encoding="utf-8"))
    assert f"{record['seconds']:.0f} seconds" in README
    assert record["seconds"] < 180


def test_every_name_it_shows_exists():
    names = set(re.findall(r"\btl\.(\w+)", README))
    assert names
    assert not [name for name in names if not hasattr(tl, name)]
