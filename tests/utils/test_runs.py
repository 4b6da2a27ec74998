import json
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError

import pytest

from tinylora_lite import Run
from tinylora_lite.utils import record


def a_run() -> Run:
    run = Run("grpo", {"seed": 7, "steps": 2, "tis_cap": None}, "14 numbers", 14, "tiny", base="ab12")
    run.steps += [{"step": 1, "reward": 0.25}, {"step": 2, "reward": 0.1 + 0.2}]
    run.evaluations.append({"step": 2, "accuracy": 0.5, "low": 0.2, "high": 0.8, "n": 10, "samples": 1})
    run.seconds = 1.5
    return run


def test_round_trip(tmp_path):
    path = a_run().save(tmp_path / "new" / "run.json")
    loaded = Run.load(path)
    assert loaded == a_run()
    assert (loaded.seed, loaded.curve(), loaded.curve("step")) == (7, [0.25, 0.1 + 0.2], [1, 2])
    assert [p.name for p in path.parent.iterdir()] == ["run.json"]


def test_the_environment_is_recorded():
    assert set(a_run().environment) == {"tinylora_lite", "torch", "transformers", "python", "machine"}


def test_a_save_that_fails_leaves_the_old_record(tmp_path):
    path = a_run().save(tmp_path / "run.json")
    broken = a_run()
    broken.settings["reward"] = lambda: 0
    with pytest.raises(TypeError):
        broken.save(path)
    assert Run.load(path) == a_run()


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("", "damaged"),
        ('{"method": "gr', "damaged"),
        ("[1, 2]", "no record of a run"),
        ('{"method": "grpo"}', "missing 4 required"),
        (json.dumps(asdict(a_run()) | {"loss": 1, "extra": 2}), "unexpected keyword argument"),
    ],
)
def test_damaged_and_foreign_files(tmp_path, content, match):
    path = tmp_path / "run.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=match) as error:
        Run.load(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_no_text_at_all(tmp_path):
    path = tmp_path / "run.json"
    path.write_bytes(b"\xff\xfe\x00PK")
    with pytest.raises(ValueError, match="damaged"):
        Run.load(path)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        Run.load(tmp_path / "run.json")


def test_metrics_of_an_older_record_have_their_new_names():
    about = {"method": "grpo", "settings": {}, "adapter": "a", "parameters": 1, "task": "t"}
    row = {"step": 1, "silent_groups": 0.5, "gap": 0.1, "largest_gap": 0.2, "capped": 0.0}
    (found,) = Run.from_dict(about | {"steps": [row]}).steps
    assert found == {
        "step": 1,
        "frac_reward_zero_std": 0.5,
        "logprob_diff_mean": 0.1,
        "logprob_diff_max": 0.2,
        "tis_clip_frac": 0.0,
    }


def test_a_checkout_that_is_not_installed_has_records_too(monkeypatch):
    def missing(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(record, "version", missing)
    assert record.environment()["tinylora_lite"] == "not installed"
