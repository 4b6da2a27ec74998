"""The benchmark of populations runs, at its smallest."""

from benchmarks import population


def test_it_compares_a_batch_of_adapters_with_one_by_one(monkeypatch):
    for name, value in {"MEMBERS": (2,), "BATCHES": {"tiny": (2, 2)}, "STEPS": 1, "ROUNDS": 1}.items():
        monkeypatch.setattr(population, name, value)
    (batch,) = population.population()["batches"]
    (found,) = batch["members"]
    assert found["K"] == 2
    assert found["speed_up"] == found["alone"][0] / found["together"][0] > 0
