"""The register: what goes in comes out, nothing goes in unchecked, and no number stands without its source."""

import copy
import io
import json
import re
from dataclasses import asdict

import pytest
from rich.console import Console

from tinylora_lite.book import register_table
from tinylora_lite.book import runs as register
from tinylora_lite.book.published import HOW, Published, Source, load_published
from tinylora_lite.book.register_table import COLUMNS, table
from tinylora_lite.book.runs import Result, collect, measured, record
from tinylora_lite.book.submission import _score
from tinylora_lite.evaluation.evaluate import close_evaluation, open_evaluation
from tinylora_lite.evaluation.score import Completion, Score
from tinylora_lite.experiment.run import run_experiment
from tinylora_lite.experiment.settings import RunSettings
from tinylora_lite.utils.record import Run


def score(right: list[int], task: str = "sums") -> Score:
    return Score.of(
        Completion(f"{task} {i}", str(i), "#### 1", float(r), 5, False, lenient=1.0, formatted=bool(r))
        for i, r in enumerate(right)
    )


def run(rewards: list[float], **changes) -> Run:
    values = {
        "method": "grpo",
        "settings": {"seed": 3, "learning_rate": 0.1},
        "adapter": "TinyLoRA(rank=2, u=1, n_tie=16)",
        "parameters": 13,
        "task": "sums",
        "base": "ab" * 32,
        "steps": [{"step": i + 1, "reward": reward} for i, reward in enumerate(rewards)],
        "seconds": 12.5,
        "environment": {"tinylora_lite": "0.1.0", "torch": "2.13.0", "python": "3.11", "machine": "Linux, one card"},
    }
    return Run(**values | changes)


WHO = {
    "model": "Qwen/Qwen2.5-7B-Instruct",
    "revision": "c" * 40,
    "prompt": "chat template, ####",
    "sent_by": "A. Reader",
}


@pytest.fixture
def result() -> Result:
    before, after = score([0, 0, 0, 1, 0, 0, 0, 1]), score([1, 1, 1, 1, 1, 1, 0, 0])
    return record(run([0.1] * 5 + [0.4] * 10 + [0.9] * 5), [measured("sums", before, after, temperature=0.0)], **WHO)


class TestRecord:
    def test_comes_back_as_it_was(self, result, tmp_path):
        path = result.save(tmp_path)
        assert path.name == "qwen2.5-7b-instruct-sums-grpo-13-seed3.json"
        assert Result.load(path) == result
        assert collect(tmp_path) == [result]
        assert [p.name for p in tmp_path.iterdir()] == [path.name]

    def test_holds_base_and_adapted_on_the_same_problems(self, result):
        (kept,) = result.scores
        assert (kept.base["accuracy"], kept.adapted["accuracy"]) == (0.25, 0.75)
        assert kept.base["lenient"] == 1.0
        assert kept.adapted["formatted"] == 0.75
        assert (kept.comparison["strict"]["better"], kept.comparison["strict"]["worse"]) == (5, 1)

    def test_says_what_ran_and_how_it_went(self, result):
        assert (result.parameters, result.bits, result.basis_bits, result.seed) == (13, 13 * 32, 0, 3)
        assert result.curve == {"steps": 20, "first": pytest.approx(0.1), "last": pytest.approx(0.9)}
        assert (result.library, result.hardware) == ("0.1.0", "Linux, one card")
        assert result.versions == {"torch": "2.13.0", "python": "3.11"}
        assert re.fullmatch(r"([0-9a-f]{40}(-dirty)?)?", result.commit)

    def test_imitation_has_no_reward_curve(self):
        kept = measured("sums", score([0, 1]), score([1, 1]), temperature=0.0)
        steps = [{"step": 1, "loss": 2.0}]
        assert record(run([], method="sft", steps=steps), [kept], **WHO).curve == {"steps": 1}

    def test_other_problems_are_refused(self):
        with pytest.raises(ValueError, match="different problems"):
            measured("sums", score([0, 1]), score([1, 1], task="products"), temperature=0.0)

    def test_nothing_is_overwritten(self, result, tmp_path):
        result.save(tmp_path)
        with pytest.raises(FileExistsError, match="recorded already"):
            result.save(tmp_path)

    def test_no_folder_is_an_empty_register(self, tmp_path):
        assert collect(tmp_path / "none") == []


def without(*path):
    def change(values):
        for key in path[:-1]:
            values = values[key]
        del values[path[-1]]

    return change


def put(value, *path):
    def change(values):
        for key in path[:-1]:
            values = values[key]
        values[path[-1]] = value

    return change


BROKEN = {
    "a field is missing": (without("prompt"), "missing fields: prompt"),
    "a field is unknown": (put(1, "gpu"), "unknown fields: gpu"),
    "no revision": (put("main", "revision"), 'revision: must be the 40 hexadecimal digits.*or "local"'),
    "no fingerprint": (put("", "base"), "base: must be"),
    "a commit in words": (put("yesterday's", "commit"), "commit: must be"),
    "nobody sent it": (put(" ", "sent_by"), "sent_by: must be a text"),
    "another method": (put("dpo", "method"), "method: must be one of grpo, sft"),
    "half a number": (put(0.5, "parameters"), "parameters: must be a whole number"),
    "no number": (put(0, "parameters"), "parameters: must be a whole number of at least 1"),
    "a yes for a number": (put(True, "bits"), "bits: must be a whole number"),
    "time runs back": (put(-1.0, "seconds"), "seconds must be a number from 0"),
    "another seed": (put(4, "seed"), "settings: must be those of training, with the seed"),
    "no scores": (put([], "scores"), "there are none"),
    "scores in words": (put("good", "scores"), "scores: must be a list"),
    "a score in words": (put("good", "scores", 0), "where fields are expected"),
    "no base": (without("scores", 0, "base"), r"scores\[0\] has missing fields: base"),
    "a base in words": (put("bad", "scores", 0, "base"), "base: must be a table"),
    "no interval": (without("scores", 0, "adapted", "high"), "adapted: missing values: high"),
    "a value of its own": (put(1.0, "scores", 0, "base", "vibes"), "base: unknown values: vibes"),
    "percent": (put(75.0, "scores", 0, "adapted", "accuracy"), "accuracy must be a number from 0 to 1"),
    "not a number": (put(float("nan"), "scores", 0, "adapted", "accuracy"), "accuracy must be a number from 0 to 1"),
    "outside its interval": (put(0.999, "scores", 0, "base", "accuracy"), "does not lie within its interval"),
    "lenient without interval": (without("scores", 0, "base", "lenient_low"), "lenient.*does not lie within"),
    "fewer problems": (put(7, "scores", 0, "adapted", "n"), "the same problems"),
    "nothing compared": (put({}, "scores", 0, "comparison"), "the comparison is not of the 8 problems"),
    "cold": (put(-0.1, "scores", 0, "temperature"), "temperature must be a number from 0"),
}


class TestCheck:
    @pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN)
    def test_what_is_wrong_is_said(self, result, tmp_path, capsys, change, message):
        path = result.save(tmp_path)
        values = json.loads(path.read_text(encoding="utf-8"))
        change(values)
        path.write_text(json.dumps(values), encoding="utf-8")
        with pytest.raises(ValueError, match=message) as raised:
            Result.load(path)
        assert str(path) in str(raised.value)
        assert register.main(["check", str(path)]) == 1
        assert capsys.readouterr().err.count("\n") == 1

    def test_twice_the_same(self, result, tmp_path):
        path = result.save(tmp_path)
        values = json.loads(path.read_text(encoding="utf-8"))
        values["scores"].append(copy.deepcopy(values["scores"][0]))
        path.write_text(json.dumps(values), encoding="utf-8")
        with pytest.raises(ValueError, match="occur twice"):
            Result.load(path)

    @pytest.mark.parametrize("text", ["", "{", "[]", '"a run"'])
    def test_no_record_at_all(self, tmp_path, text):
        path = tmp_path / "a.json"
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="no record for the register"):
            Result.load(path)

    def test_command_line(self, result, tmp_path, capsys):
        good, missing = result.save(tmp_path), tmp_path / "none.json"
        assert register.main(["check", str(good)]) == 0
        assert "sums, temperature 0, n = 8: 25.0% -> 75.0%" in capsys.readouterr().out
        assert register.main(["check", str(missing), str(good)]) == 1
        shown = capsys.readouterr()
        assert "none.json" in shown.err
        assert "good" in shown.out

    def test_register_of_the_book(self):
        for kept in collect():
            assert kept.sent_by


@pytest.fixture(scope="module")
def published() -> list[Published]:
    return load_published()


class TestPublished:
    def test_every_number_has_its_source(self, published):
        assert len(published) > 400
        for row in published:
            assert row.source.title.strip()
            assert row.source.url.startswith("https://")
            assert row.where.strip()
            assert row.how in HOW

    def test_every_key_is_in_the_bibliography(self, published):
        bibliography = register.RESULTS.parent / "references.bib"
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
        ("change", "message"),
        [
            (without("rows", 0, "source"), "row 0 has missing fields: source"),
            (put("hearsay", "rows", 0, "source"), "'hearsay' is none of the sources"),
            (put("", "rows", 0, "where"), "the place where it stands"),
            (put(75.6, "rows", 0, "value"), "a share from 0 to 1"),
            (put(1, "rows", 0, "value"), "finite floats"),
            (put("?", "rows", 0, "how"), "how must be one of"),
            (put(1.5, "rows", 0, "n"), "n must be a whole number"),
            (put("x", "rows", 0, "gpu"), "unknown fields: gpu"),
            (without("sources"), "sources"),
        ],
    )
    def test_a_number_without_them_is_refused(self, tmp_path, change, message):
        values = json.loads((register.RESULTS / "published.json").read_text(encoding="utf-8"))
        change(values)
        path = tmp_path / "published.json"
        path.write_text(json.dumps(values), encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            load_published(path)


def published_row(**changes) -> Published:
    source = Source("replication", "someone/else@1234567", "https://example.org/a?b=1&c=2")
    values = {"model": "Qwen2.5-7B-Instruct", "task": "sums", "method": "TinyLoRA", "parameters": 13}
    values |= {"metric": "accuracy", "value": 0.9, "untrained": 0.8, "seeds": 3, "n": 100, "how": "S"}
    return Published(**values | {"source": source, "where": "figure <1>"} | changes)


class TestTable:
    def test_says_where_nothing_has_run(self):
        rows = table("Qwen2.5-7B-Instruct", "gsm8k", results=[]).rows
        assert [row.what for row in rows if row.value is None] == ["not yet run"]
        assert rows[-1].who == "this book"

    def test_a_run_stands_beside_what_was_published(self, result):
        rows = table("qwen/qwen2.5-7b-instruct", "sums", published=[published_row()], results=[result]).rows
        assert [(row.who, row.value, row.untrained) for row in rows] == [
            ("someone/else@1234567", 0.9, 0.8),
            ("this book, A. Reader", 0.75, 0.25),
        ]
        low, high = rows[1].interval
        assert low < 0.75 < high
        assert rows[1].where == "runs/qwen2.5-7b-instruct-sums-grpo-13-seed3.json"

    def test_every_number_has_its_source(self):
        for row in table(results=[]).rows:
            assert row.value is None or (row.where and row.url)

    def test_all_tasks_of_a_model_are_told_apart(self, result):
        rows = table("Qwen2.5-7B-Instruct", results=[result]).rows
        assert {row.what.split(":")[0] for row in rows} >= {
            "Qwen2.5-7B-Instruct, gsm8k",
            "Qwen2.5-7B-Instruct, sums",
        }

    def test_press_is_no_evidence(self):
        assert not any("MarkTechPost" in row.who for row in table(results=[]).rows)

    def test_nothing_known(self):
        with pytest.raises(
            ValueError, match=r"nothing is known of GPT-5 on gsm8k; the models are: .*Qwen2.5-7B-Instruct"
        ):
            table("GPT-5", "gsm8k", results=[])

    def test_markdown(self, result):
        lines = (
            table("Qwen2.5-7B-Instruct", "sums", published=[published_row()], results=[result]).markdown().split("\n")
        )
        assert {line.count("|") for line in lines} == {len(COLUMNS) + 1}
        assert lines[2].endswith("| [someone/else@1234567](https://example.org/a?b=1&c=2): figure <1> |")
        assert "75.0% [" in lines[3]

    def test_html_can_be_read_aloud(self, result):
        bs4 = pytest.importorskip("bs4")
        drawn = table("Qwen2.5-7B-Instruct", "sums", published=[published_row()], results=[result])
        page = bs4.BeautifulSoup(drawn._repr_html_(), "html.parser")
        assert page.caption.text == "Qwen2.5-7B-Instruct on sums"
        assert [head.text for head in page.select("thead th[scope=col]")] == list(COLUMNS)
        assert [len(row.find_all(["th", "td"])) for row in page.select("tbody tr")] == [len(COLUMNS)] * 2
        assert len(page.select("tbody th[scope=row]")) == 2
        assert page.select_one("a")["href"] == "https://example.org/a?b=1&c=2"
        assert "figure <1>" in page.text

    def test_terminal(self, result):
        drawn = table("Qwen2.5-7B-Instruct", "sums", published=[published_row()], results=[result])
        console = Console(record=True, width=80, file=io.StringIO())
        console.print(drawn.rich())
        text = console.export_text()
        assert "90.0%" in text
        assert "75.0%" in text
        assert max(map(len, text.splitlines())) <= 80

    def test_command_line(self, capsys):
        assert register.main(["table", "--model", "Qwen2.5-7B-Instruct", "--task", "aime24"]) == 0
        assert "16.0%" in capsys.readouterr().out


def test_columns_match():
    empty = register_table.Row("a", "not yet run")
    full = register_table.Row("a", "b", 1, 0.5, (0.4, 0.6), 0.3, 10, 2, "c")
    drawn = register_table.Table("t", (empty, full))
    assert {len(drawn.cells(row)) for row in drawn.rows} == {len(COLUMNS)}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    training = {"steps": 2, "prompts_per_step": 2, "group_size": 2, "max_new_tokens": 16}
    settings = RunSettings.from_dict(
        {
            "model": "nano",
            "task": "nano",
            "dtype": "float32",
            "adapter": {"rank": 2, "u": 1, "n_tie": 4},
            "training": training,
            "learning_rates": [0.1, 0.01],
            "evaluation": {"tasks": ["nano"], "problems": 6, "max_new_tokens": 16},
            "folder": str(tmp_path_factory.mktemp("experiment") / "run"),
        }
    )
    return run_experiment(settings)


class TestMake:
    """From what ``tinylora train`` leaves to a record, on the nano base."""

    def test_record_of_a_folder(self, finished, tmp_path, capsys):
        arguments = ["make", str(finished.folder), "--sent-by", "A. Reader", "--notes", "a test", "--to", str(tmp_path)]
        assert register.main(arguments) == 0
        (kept,) = collect(tmp_path)
        (scored,) = kept.scores
        assert (scored.base, scored.adapted) == (finished.base["nano"].details(), finished.adapted["nano"].details())
        assert scored.comparison == json.loads(json.dumps(finished.comparisons["nano"].summary()))
        assert kept.settings == json.loads(json.dumps(finished.run.settings))
        assert (kept.model, kept.revision, kept.parameters, kept.bits) == ("nano", "local", 13, 13 * 32)
        assert (kept.basis_bits, kept.notes, kept.sent_by) == (0, "a test", "A. Reader")
        assert finished.base["nano"].completions[0].prompt in kept.prompt
        assert register.main(arguments) == 1
        assert "recorded already" in capsys.readouterr().err

    def test_parts_of_several_processes_are_put_together(self, finished, tmp_path):
        whole = finished.base["nano"]
        padded = [*whole.completions, whole.completions[-1], whole.completions[-1]]  # 6 problems for 4 processes
        for rank in range(4):
            write_evaluation(tmp_path / f"{rank + 1}-of-4", Score.of(padded[rank::4]))
        assert _score(tmp_path, whole.summary()) == whole

    def test_an_unfinished_folder(self, tmp_path, capsys):
        assert register.main(["make", str(tmp_path), "--sent-by", "A. Reader"]) == 1
        assert "holds no outcome.json" in capsys.readouterr().err


def write_evaluation(folder, part: Score) -> None:
    open_evaluation(folder, {})
    rows = [asdict(completion) | {"problem": i, "sample": 0} for i, completion in enumerate(part.completions)]
    close_evaluation(folder, rows, {})
