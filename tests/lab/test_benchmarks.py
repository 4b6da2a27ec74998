"""The benchmark of populations runs, at its smallest, and no benchmark measures a hit of the cache."""

import json
import os

from benchmarks import __main__ as benchmarks
from benchmarks import population


def test_it_compares_a_batch_of_adapters_with_one_by_one(monkeypatch):
    for name, value in {"MEMBERS": (2,), "BATCHES": {"tiny": (2, 2)}, "STEPS": 1, "ROUNDS": 1}.items():
        monkeypatch.setattr(population, name, value)
    (batch,) = population.population()["batches"]
    (found,) = batch["members"]
    assert found["K"] == 2
    assert found["speed_up"] == found["alone"][0] / found["together"][0] > 0


def test_they_are_measured_without_the_user_s_cache(monkeypatch, tmp_path):
    def part():
        """What a part sees."""
        return {"cache": os.environ["TINYLORA_CACHE"]}

    monkeypatch.setenv("TINYLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(benchmarks.PARTS, "svd", part)
    monkeypatch.setattr("sys.argv", ["benchmarks", "svd", "--out", str(tmp_path / "new" / "record.json")])
    benchmarks.main()
    assert json.loads((tmp_path / "new" / "record.json").read_text())["svd"]["cache"] == "off"
