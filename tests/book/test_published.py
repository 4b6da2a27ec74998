"""The table of published numbers and of our runs: no number without its source, and no run that contradicts itself."""

import json
import re
import shutil
from pathlib import Path

import pytest
from pydantic import ValidationError

pytest.importorskip("pandas")

from tinylora_lite.book import published as module
from tinylora_lite.book.published import (
    FILES,
    HOW,
    RESULTS,
    Published,
    Source,
    load_published,
    load_run,
    main_rows,
    markdown,
    recorded,
    table,
)
from tinylora_lite.experiment.settings import load_settings
from tinylora_lite.utils.record import Run

SEVEN = "Qwen2.5-7B-Instruct"


@pytest.fixture(scope="module")
def published() -> list[Published]:
    return load_published()


def score(accuracy: float, n: int = 8) -> dict:
    return {"accuracy": accuracy, "low": accuracy - 0.1, "high": accuracy + 0.1, "n": n, "samples": 1}


@pytest.fixture
def run(tmp_path) -> Path:
    """The folder of a finished experiment, as ``tinylora train`` leaves it, less what the table does not need."""
    folder = tmp_path / "seven-13-seed3"
    values = {"model": "Qwen/Qwen2.5-7B-Instruct", "adapter": "TinyLoRA(rank=2, u=1, n_tie=16)", "parameters": 13}
    values |= {"method": "grpo", "seed": 3, "temperature": 0.0}
    values |= {"base": {"sums": score(0.25)}, "trained": {"sums": score(0.75)}}
    folder.mkdir()
    (folder / "outcome.json").write_text(json.dumps(values), encoding="utf-8")
    return folder


def change(path: Path, *keys, value=None) -> None:
    """Sets a value inside a file of JSON; without one, removes it."""
    whole = values = json.loads(path.read_text(encoding="utf-8"))
    for key in keys[:-1]:
        values = values[key]
    if value is None:
        del values[keys[-1]]
    else:
        values[keys[-1]] = value
    path.write_text(json.dumps(whole), encoding="utf-8")


class TestPublished:
    def test_every_number_has_its_source(self, published):
        assert len(published) > 400
        for row in published:
            assert row.source.title.strip()
            assert row.source.url.startswith("https://")
            assert row.where.strip()
            assert row.how in HOW
            if row.metric == "accuracy":
                assert 0 <= row.value <= 1
                assert 0 <= (row.untrained or 0) <= 1

    def test_every_key_is_in_the_bibliography(self, published):
        bibliography = RESULTS.parent / "references.bib"
        if not bibliography.exists():
            pytest.skip("no checkout")
        keys = set(re.findall(r"@\w+\{([^,]+),", bibliography.read_text(encoding="utf-8")))
        assert {row.source.key for row in published} - {None} <= keys

    def test_what_the_paper_says_of_itself_is_not_secondary(self, published):
        for row in published:
            assert (row.how in "PF") == (row.source.kind == "paper")

    def test_means_of_table_2(self, published):
        # An independent check of 22 rows with six numbers each: the paper prints their means.
        rows = [row for row in published if row.where.startswith("table 2")]
        means = [row for row in rows if row.task == "mean of six"]
        assert len(means) == 22
        for mean in means:
            own = [r.value for r in rows if (r.model, r.parameters) == (mean.model, mean.parameters) and r is not mean]
            assert len(own) == 6
            assert sum(own) / 6 == pytest.approx(mean.value, abs=0.00051)

    @pytest.mark.parametrize(
        ("keys", "value", "message"),
        [
            (("rows", 0, "source"), None, "0.source\n"),
            (("rows", 3, "source"), "hearsay", "3.source\n"),
            (("rows", 0, "where"), " ", "0.where\n"),
            (("rows", 0, "value"), "0.7", "value\n"),
            (("rows", 0, "how"), "?", "how\n"),
            (("rows", 0, "n"), 1.5, "n\n"),
            (("rows", 0, "parameters"), -1, "parameters\n"),
            (("rows", 0, "gpu"), "x", "gpu\n +Extra inputs are not permitted"),
            (("rows", 0, "seeds"), None, "seeds\n +Field required"),
            (("sources", "paper", "kind"), "rumour", "kind\n"),
        ],
    )
    def test_a_number_without_them_is_refused(self, tmp_path, monkeypatch, keys, value, message):
        path = Path(shutil.copy(module.PUBLISHED, tmp_path))
        change(path, *keys, value=value)
        monkeypatch.setattr(module, "PUBLISHED", path)
        with pytest.raises(ValueError, match=message):
            load_published()


def assert_of_one_run(folder: Path, record: Path) -> None:
    """The three files of a record belong together, and each score is inside its interval."""
    outcome = json.loads((folder / "outcome.json").read_text(encoding="utf-8"))
    run, settings = Run.load(record), load_settings(folder / "settings.yaml")
    assert (run.adapter, run.parameters, run.seed) == tuple(outcome[k] for k in ("adapter", "parameters", "seed"))
    assert run.settings["learning_rate"] == outcome["learning_rate"]
    assert (settings.model, settings.evaluation.temperature) == (outcome["model"], outcome["temperature"])
    for task, trained in outcome["trained"].items():
        assert trained["n"] == outcome["base"][task]["n"]
        assert trained["low"] <= trained["accuracy"] <= trained["high"]


class TestRun:
    def test_a_row_says_what_ran_and_on_what(self, run):
        (row,) = load_run(run)
        assert row.what == "TinyLoRA(rank=2, u=1, n_tie=16), RL, seed 3, greedy"
        assert (row.model, row.task, row.parameters) == (SEVEN, "sums", 13)
        assert (row.value, row.untrained, row.n) == (0.75, 0.25, 8)
        assert row.low < 0.75 < row.high
        assert row.where == "runs/seven-13-seed3"

    def test_sampled_answers_are_told_from_greedy_ones(self, run):
        change(run / "outcome.json", "temperature", value=0.7)
        assert load_run(run)[0].what.endswith("temperature 0.7")

    def test_the_first_outcomes_name_neither_seed_nor_temperature(self, run):
        for key in ("seed", "temperature"):
            change(run / "outcome.json", key)
        assert load_run(run)[0].what.endswith("RL")

    def test_a_missing_or_damaged_file_is_refused(self, run):
        for damage in (lambda path: path.write_text("{", encoding="utf-8"), Path.unlink):
            damage(run / "outcome.json")
            with pytest.raises(ValueError, match="is not the outcome of a run") as raised:
                load_run(run)
            assert str(run) in str(raised.value)

    @pytest.mark.parametrize(
        ("keys", "message"), [(("trained",), "trained"), (("base", "sums"), "sums"), (("seed",), "seed")]
    )
    def test_a_record_that_lacks_something_is_refused(self, run, keys, message):
        change(run / "outcome.json", *keys)
        with pytest.raises(ValueError, match=message):
            load_run(run)

    def test_the_book_s_runs(self):
        """What a pull request with a run has to pass."""
        for folder in recorded():
            assert load_run(folder), f"{folder}: no task was scored"
            assert {path.name for path in folder.iterdir()} == set(FILES)
            assert_of_one_run(folder, folder / "run.json")

    def test_no_folder_is_no_run(self, tmp_path, monkeypatch):
        monkeypatch.setattr(module, "RUNS", tmp_path / "none")
        assert recorded() == []


class TestTable:
    def test_says_where_nothing_has_run(self):
        rows = table(SEVEN, "gsm8k", runs=[])
        assert markdown(rows).endswith("| not yet run |  |  |  |  | this book |")

    def test_a_run_stands_beside_what_was_published(self, run):
        change(run / "outcome.json", "base", value={"gsm8k": score(0.25)})
        change(run / "outcome.json", "trained", value={"gsm8k": score(0.75)})
        rows = table("qwen/qwen2.5-7b-instruct", "gsm8k", runs=[run])
        assert list(rows.kind).index("paper") < list(rows.kind).index("replication") < list(rows.kind).index("run")
        assert list(rows.who)[-1] == "this book"
        assert "not yet run" not in markdown(rows)
        assert "| 75.0% [65.0%, 85.0%] | 25.0% | 8 problems, 1 seed | this book: runs/seven-13-seed3 |" in markdown(
            rows
        )

    def test_every_published_number_is_there_as_it_was_published(self, published):
        rows = table(runs=[])
        kept = [row for row in published if row.metric == "accuracy" and row.source.kind != "press"]
        assert sorted(zip(rows["where"], rows.accuracy, rows.url, strict=True)) == sorted(
            (row.where + ", read off" * (row.how == "F"), row.value, row.source.url) for row in kept
        )

    def test_a_task_that_only_a_run_knows(self, run):
        rows = table(task="sums", runs=[run])
        assert list(rows.kind) == ["run"]
        assert markdown(main_rows(rows)).endswith("| this book: runs/seven-13-seed3 |")

    def test_press_is_no_evidence(self):
        assert not table(runs=[]).who.str.contains("MarkTechPost").any()

    def test_nothing_known(self):
        with pytest.raises(LookupError, match=rf"nothing is known of GPT-5 on gsm8k; models are: .*{SEVEN}"):
            table("GPT-5", "gsm8k", runs=[])

    def test_the_book_s_own_runs_are_taken_where_none_are_named(self, run, monkeypatch):
        monkeypatch.setattr(module, "recorded", lambda: [run])
        assert set(table(task="sums")["where"]) == {"runs/seven-13-seed3"}

    def test_markdown(self):
        lines = markdown(table(SEVEN, "gsm8k", runs=[])).split("\n")
        assert {line.count("|") for line in lines} == {7}
        assert lines[2] == (
            "| untrained | 0 | 75.6% |  |  | [paper, arXiv v1](https://arxiv.org/abs/2602.04118):"
            " figure 1, dashed line, read off |"
        )

    def test_main_rows_are_comparable_ones_and_every_run(self, run):
        change(run / "outcome.json", "base", value={"gsm8k": score(0.25)})
        change(run / "outcome.json", "trained", value={"gsm8k": score(0.75)})
        whole = table(SEVEN, "gsm8k", runs=[run])
        kept = main_rows(whole)
        assert set(kept.parameters) == {0, 13, 196, 7_615_487_488}
        assert "sft" not in set(kept.training.dropna())
        assert list(kept.kind)[-1] == "run"
        assert {13, 25} <= set(whole.parameters)
        few = main_rows(whole, (0, 1), all_weights=False)
        assert set(few.parameters[few.kind != "run"]) == {0, 1}
        assert list(few.kind)[-1] == "run"


def test_a_row_in_words():
    source = Source(kind="replication", title="a", url="https://b")
    values = {"model": "m", "task": "t", "method": "TinyLoRA", "parameters": 13, "metric": "accuracy", "value": 0.5}
    values |= {"untrained": None, "seeds": None, "n": None, "how": "S", "source": source, "where": "here"}
    row = Published(**values | {"training": "sft", "u": 13, "n_tie": "all", "scoring": "strict", "approximate": True})
    assert row.what == "TinyLoRA, SFT, u = 13, n_tie = all, strict, roughly"
    with pytest.raises(ValidationError):
        Published(**values | {"value": float("nan")})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    from tinylora_lite.experiment.run import run_experiment
    from tinylora_lite.experiment.settings import RunSettings

    training = {"steps": 1, "prompts_per_step": 2, "group_size": 2, "max_new_tokens": 8}
    settings = {"model": "nano", "task": "nano", "dtype": "float32", "training": training}
    settings |= {"adapter": {"rank": 2, "u": 1, "n_tie": 4}, "learning_rates": [0.1, 0.01]}
    settings |= {"evaluation": {"tasks": ["nano"], "problems": 4, "max_new_tokens": 8}}
    settings |= {"folder": str(tmp_path_factory.mktemp("experiment") / "run")}
    return run_experiment(RunSettings.from_dict(settings))


class TestExperiment:
    """What ``tinylora train`` leaves is a record as it is."""

    def test_a_finished_experiment_is_a_row(self, finished):
        (row,) = load_run(finished.folder)
        assert (row.model, row.task, row.parameters) == ("nano", "nano", 13)
        assert row.value == finished.adapted["nano"].accuracy
        assert row.untrained == finished.base["nano"].accuracy
        assert f"seed {finished.run.seed}" in row.what
        assert re.match(r"13 numbers on \d+ modules .*rank=2, u=1, n_tie=4", row.what), "words, and no dictionary"

    def test_its_three_files_are_a_record(self, finished):
        runs = {Run.load(path).settings["learning_rate"]: path for path in finished.folder.rglob("run.json")}
        assert_of_one_run(finished.folder, runs[finished.run.settings["learning_rate"]])
