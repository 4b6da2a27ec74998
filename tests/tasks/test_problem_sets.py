"""Problem sets from folders in both layouts and from the hub's cache: a few rows of each kind, and the real files."""

import dataclasses
import datetime
import json
import pickle
import re
import types
from pathlib import Path

import pytest

import tinylora_lite as tl
from tinylora_lite.tasks.catalog import PLAIN_CHAT_TEMPLATE, PROBLEM_SETS, PROMPTS
from tinylora_lite.tasks.datasets import find_commit

DATA = Path(__file__).parents[3] / "shared" / "data"
REQUEST = r"Please reason step by step, and put your final answer within \boxed{}."

needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the real data sets are not in {DATA}")
small = pytest.mark.filterwarnings("ignore:.* makes .* problems of:UserWarning")

GSM8K = [
    {"question": "Tom has 3 eggs and buys 4. How many?", "answer": "He has 3+4=<<3+4=7>>7 eggs.\n#### 7"},
    {"question": "Eva had 2,000 pens and sold 500.", "answer": "2000-500=$<<2000-500=1500>>1,500\n#### 1,500"},
    {"question": "Ann owes $5. What is her balance?", "answer": "0-5=<<0-5=-5>>-5\n#### -5"},
    {"question": "Half of 1 litre?", "answer": "1/2=<<1/2=.5>>.5\n#### 0.5"},
    {"question": "Two dozen eggs?", "answer": "12*2=<<12*2=24>>24\n#### 24"},
]
SIMPLERL = [
    {
        "question": "What is $1/2 + 1/4$?",
        "gt_answer": r"\frac{3}{4}",
        "answer": "unused",
        "level": 3,
        "subject": "Algebra",
    },
    {"question": "Which day?", "gt_answer": r"\text{Friday}", "answer": "unused", "level": 4, "subject": "Algebra"},
    {"question": "A row without an answer", "gt_answer": "", "answer": "unused", "level": 5, "subject": "Algebra"},
]
ROWS = {
    "math500": {"problem": "$1+1$?", "solution": r"It is $\boxed{2}$.", "answer": "2", "level": 1},
    "minerva": {"question": "The flux?", "answer": r"4.5e33", "type": "x"},
    "gaokao": {"id": 1, "question": "Solve.", "answer": r"$\{1,2\}$"},
    "olympiadbench": {
        "question": "Sum?",
        "solution": ["Long."],
        "final_answer": ["$2^{1009}$"],
        "answer_type": "Numerical",
    },
    "collegemath": {"problem": "Integrate.", "answer": "$x^2+C$"},
    "aime24": {"id": 60, "problem": "Walk.", "solution": r"\boxed{025}", "url": "x"},
    "amc23": {"id": 0, "question": "Bike.", "answer": 27.0, "url": "x"},
}
RIGHT = {
    "math500": "2.0",
    "minerva": r"4.5\times 10^{33}",
    "gaokao": r"\{2,1\}",
    "olympiadbench": "2^{1009}",
    "collegemath": "C+x^2",
    "aime24": "25",
    "amc23": "27",
}


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_parquet(path: Path, rows: list[dict]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.fixture
def gsm8k(tmp_path) -> Path:
    write_lines(tmp_path / "gsm8k" / "train.jsonl", GSM8K)
    write_lines(tmp_path / "gsm8k" / "test.jsonl", GSM8K[:2])
    return tmp_path


@pytest.fixture(autouse=True)
def _no_process(monkeypatch):
    """Loading starts the process that compares; only tests of mathematics need it."""
    monkeypatch.setattr("tinylora_lite.tasks.math_equal.start", lambda: None)


# --- folders ---------------------------------------------------------------------------------------------------------


@small
def test_lines_in_a_folder(gsm8k):
    task = tl.load_task("gsm8k", data=gsm8k, validation=2)
    assert (task.name, len(task.train), len(task.validation), len(task.test)) == ("gsm8k", 3, 2, 2)
    example = task.test[1]
    assert example.gold == "1,500"
    assert example.solution == "2000-500=$1,500\n#### 1,500"
    assert example.prompt.startswith("Eva had 2,000 pens and sold 500.")
    assert tl.load_task("gsm8k", data=str(gsm8k), validation=2).train == task.train
    assert tl.load_task("gsm8k", data=gsm8k / "gsm8k", validation=2).test == task.test


@small
@pytest.mark.parametrize("place", ["openai/gsm8k", "gsm8k", "."])
def test_a_copy_of_the_hubs_repository(tmp_path, gsm8k, place):
    copy = tmp_path / "copies"
    write_parquet(copy / place / "main" / "train-00000-of-00002.parquet", GSM8K[:3])
    write_parquet(copy / place / "main" / "train-00001-of-00002.parquet", GSM8K[3:])
    write_parquet(copy / place / "main" / "test-00000-of-00001.parquet", GSM8K[:2])
    write_parquet(copy / place / "socratic" / "test-00000-of-00001.parquet", GSM8K[4:])  # the other configuration
    loaded, expected = (tl.load_task("gsm8k", data=data, validation=1) for data in (copy, gsm8k))
    assert loaded.train == expected.train
    assert loaded.validation == expected.validation
    assert loaded.test == expected.test


@small
def test_simplerl_from_a_copy(tmp_path):
    write_parquet(tmp_path / "simplelr_qwen_level3to5" / "train.parquet", SIMPLERL)
    write_parquet(tmp_path / "simplelr_qwen_level3to5" / "test.parquet", SIMPLERL[:1])
    write_parquet(tmp_path / "simplelr_abel_level3to5" / "train.parquet", SIMPLERL[:1])
    task = tl.load_task("math", data=tmp_path, validation=0)
    assert [example.gold for example in task.train] == [r"\frac{3}{4}", r"\text{Friday}"], (
        "and no row without an answer"
    )
    assert len(task.test) == 1
    assert task.messages(task.test[0]) == [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "What is $1/2 + 1/4$?\n" + REQUEST},
    ]


@small
@pytest.mark.parametrize("name", ROWS)
def test_benchmarks(tmp_path, monkeypatch, name):
    """The rows as each repository has them, and an answer that says the same in other words."""
    pytest.importorskip("math_verify")
    monkeypatch.undo()
    files = PROBLEM_SETS[name].files.get("test", "test.jsonl")
    write_lines(tmp_path / PROBLEM_SETS[name].hub / files, [ROWS[name]])
    task = tl.load_task(name, data=tmp_path)
    assert (len(task.train), len(task.validation), len(task.test)) == (0, 0, 1)
    gold = task.test[0].gold
    assert task.score(rf"\boxed{{{RIGHT[name]}}}", gold) == 1.0
    assert task.score(rf"\boxed{{{gold}}}", gold) == 1.0
    assert task.score(rf"\boxed{{{RIGHT[name]}+1}}", gold) == 0.0
    assert task.score(f"It is {RIGHT[name]}.", gold) == 0.0
    assert task.lenient(f"The answer is ${RIGHT[name]}$.", gold) == 1.0


@small
def test_another_number_of_problems_than_the_whole_is_a_warning(gsm8k):
    with pytest.warns(UserWarning, match=r"test\.jsonl makes 2 problems of gsm8k, the whole is 1319"):
        tl.load_task("gsm8k", data=gsm8k)


@small
def test_a_split_that_a_folder_lacks_is_empty(tmp_path):
    write_lines(tmp_path / "train.jsonl", GSM8K)
    task = tl.load_task("gsm8k", data=tmp_path)
    assert (len(task.train), len(task.validation), len(task.test)) == (4, 1, 0)


# --- what can be wrong -----------------------------------------------------------------------------------------------


@small
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "gsm9k"}, "no problem set 'gsm9k'; there are gsm8k, math, math500"),
        ({"prompt": "box"}, "no prompt 'box'; there are boxed, boxed-system, ####, plain"),
        ({"validation": 5}, "validation must be from 0 to 4"),
        ({"validation": -1}, "validation must be from 0 to 4"),
    ],
)
def test_bad_arguments(gsm8k, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        tl.load_task(**{"name": "gsm8k", "data": gsm8k} | arguments)
    assert "\n" not in str(error.value)


@small
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"question": "x"}', "no column answer; it has question"),
        ("{", "cannot be read"),
        ("[1]", "something other than rows"),
        ("\udcff", "cannot be read"),
    ],
)
def test_bad_files(tmp_path, text, message):
    (tmp_path / "test.jsonl").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=message) as error:
        tl.load_task("gsm8k", data=tmp_path)
    assert "\n" not in str(error.value)


@small
def test_a_damaged_parquet_file(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "test.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(ValueError, match=r"test\.parquet cannot be read"):
        tl.load_task("gsm8k", data=tmp_path)


def test_no_such_folder(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no train\.jsonl or test\.jsonl of gsm8k, and no copy of openai/gsm8k, in"
    ):
        tl.load_task("gsm8k", data=tmp_path / "nowhere")


# --- prompts, formats, splits ----------------------------------------------------------------------------------------


@small
@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_worked_answers_earn_the_reward_of_every_prompt(gsm8k, prompt):
    task = tl.load_task("gsm8k", data=gsm8k, prompt=prompt, validation=0)
    for example in task.train:
        assert "<<" not in example.solution
        assert task.score(example.solution, example.gold) == 1.0
        assert task.lenient(example.solution, example.gold) == 1.0
        assert task.formatted is None or task.formatted(example.solution)


@small
def test_prompts_and_their_formats(gsm8k):
    question, unmarked = GSM8K[0]["question"], "The answer is 7."
    hashes, boxed, system, plain = (
        tl.load_task("gsm8k", data=gsm8k, prompt=prompt) for prompt in (None, "boxed", "boxed-system", "plain")
    )
    assert hashes.messages(hashes.test[0]) == [
        {"role": "user", "content": f'{question} Let\'s think step by step and output the final answer after "####".'}
    ]
    assert boxed.messages(boxed.test[0])[1]["content"] == f"{question}\n{REQUEST}"
    assert system.messages(system.test[0]) == [
        {"role": "system", "content": REQUEST},
        {"role": "user", "content": question},
    ]
    assert plain.messages(plain.test[0]) == [{"role": "user", "content": question}]
    assert [task.score("#### 7", "7") for task in (hashes, boxed, system, plain)] == [1, 0, 0, 1]
    assert [task.score(r"\boxed{7}", "7") for task in (hashes, boxed, system, plain)] == [0, 1, 1, 1]
    assert [task.score(unmarked, "7") for task in (hashes, boxed, system, plain)] == [0, 0, 0, 1]
    assert [task.lenient(unmarked, "7") for task in (hashes, boxed, system, plain)] == [1, 1, 1, 1]
    assert [task.formatted("#### 8") for task in (hashes, boxed)] == [True, False]
    assert plain.formatted is None


@small
def test_validation_depends_on_its_seed_alone(gsm8k):
    tasks = [tl.load_task("gsm8k", data=gsm8k, validation=2, seed=seed) for seed in range(8)]
    for task in tasks:
        assert {e.prompt for e in task.train}.isdisjoint(e.prompt for e in task.validation)
        assert len(task.train) + len(task.validation) == len(GSM8K)
    assert len({task.validation for task in tasks}) > 1
    assert tasks[3].validation == tl.load_task("gsm8k", data=gsm8k, validation=2, seed=3).validation
    other = tl.load_task("gsm8k", data=gsm8k, validation=2, prompt="plain")
    assert [e.gold for e in other.validation] == [e.gold for e in tasks[0].validation], "whatever the prompt"


@small
def test_tasks_can_be_sent_to_other_processes(gsm8k):
    task = tl.load_task("gsm8k", data=gsm8k)
    copy = pickle.loads(pickle.dumps(task))
    assert copy.test == task.test
    assert copy.score("#### 7", "7") == 1.0


@small
def test_a_template_for_models_that_have_none(gsm8k, tokenizer):
    task = tl.load_task("gsm8k", data=gsm8k, prompt="boxed-system")
    text = tokenizer.apply_chat_template(
        task.messages(task.test[0]), chat_template=PLAIN_CHAT_TEMPLATE, tokenize=False, add_generation_prompt=True
    )
    assert text == f"{REQUEST}\nQuestion:\n{GSM8K[0]['question']}\nAnswer:\n"


# --- the hub ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROBLEM_SETS)
def test_every_set_is_pinned(name):
    source = PROBLEM_SETS[name]
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", source.hub)
    assert re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{7}|\d{4}-\d\d-\d\d", source.revision)
    assert source.rows["test"] > 0
    assert source.form in PROMPTS
    assert set(source.files) <= set(source.rows)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """``hub(name, rows, commit)`` puts files into the hub's cache; the hub itself is out of reach."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def put(name: str, files: dict[str, list[dict]], commit: str) -> None:
        folder = tmp_path / f"datasets--{PROBLEM_SETS[name].hub.replace('/', '--')}" / "snapshots" / commit
        for path, rows in files.items():
            (write_parquet if path.endswith(".parquet") else write_lines)(folder / path, rows)
        counts = {split: sum(len(r) for p, r in files.items() if split in p) for split in PROBLEM_SETS[name].rows}
        monkeypatch.setitem(PROBLEM_SETS, name, dataclasses.replace(PROBLEM_SETS[name], rows=counts))

    return put


def test_the_hubs_cache_without_network(hub, gsm8k):
    files = {"main/train-00000-of-00001.parquet": GSM8K, "main/test-00000-of-00001.parquet": GSM8K[:2]}
    hub("gsm8k", files, PROBLEM_SETS["gsm8k"].revision)
    task = tl.load_task("gsm8k", validation=2)
    assert len(task.train) == 3
    assert task.test == tl.load_task("gsm8k", data=gsm8k, validation=2).test


def test_another_commit_in_the_cache_is_not_taken(hub):
    hub("math500", {"test.jsonl": [ROWS["math500"]]}, "0" * 40)
    with pytest.raises(OSError, match=r"HuggingFaceH4/MATH-500 cannot be loaded from the hub .* pass data=") as error:
        tl.load_task("math500")
    assert "\n" not in str(error.value)


def test_the_hubs_rows_are_counted(hub, monkeypatch):
    hub("math500", {"test.jsonl": [ROWS["math500"]] * 3}, PROBLEM_SETS["math500"].revision)
    assert len(tl.load_task("math500").test) == 3
    monkeypatch.setitem(PROBLEM_SETS, "math500", dataclasses.replace(PROBLEM_SETS["math500"], rows={"test": 500}))
    with pytest.raises(ValueError, match="has 3 test problems where 500 are expected"):
        tl.load_task("math500")


def test_a_commit_by_its_first_digits(hub):
    folder = "simplelr_qwen_level3to5"
    commit = "50ec8f0" + "1" * 33
    hub("math", {f"{folder}/train.parquet": SIMPLERL, f"{folder}/test.parquet": SIMPLERL[:1]}, commit)
    assert len(tl.load_task("math", validation=0).train) == 2


@pytest.fixture
def history(monkeypatch):
    """``history((commit, day), ...)``: what the hub says of a repository's commits, the newest first."""
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def say(*commits: tuple[str, str]) -> None:
        listed = [
            types.SimpleNamespace(commit_id=commit, created_at=datetime.datetime.fromisoformat(f"{day}T12:00:00+00:00"))
            for commit, day in commits
        ]
        monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_commits", lambda self, hub, repo_type: listed)

    return say


def test_commits_are_looked_up_in_the_history(history):
    newest, middle, oldest = "c" * 40, "50ec8f0" + "b" * 33, "a" * 40
    history((newest, "2026-05-05"), (middle, "2025-01-06"), (oldest, "2024-12-31"))
    assert find_commit(PROBLEM_SETS["math"]) == middle
    assert find_commit(PROBLEM_SETS["collegemath"]) == middle
    assert find_commit(PROBLEM_SETS["gsm8k"]) == PROBLEM_SETS["gsm8k"].revision
    history((newest, "2026-05-05"))
    for name in ("math", "collegemath"):
        with pytest.raises(OSError, match=r"has no commit .* in its history"):
            find_commit(PROBLEM_SETS[name])


# --- the real files --------------------------------------------------------------------------------------------------


@needs_data
@pytest.mark.filterwarnings("error")
def test_the_real_gsm8k():
    task = tl.load_task("gsm8k", data=DATA)
    assert (len(task.train), len(task.validation), len(task.test)) == (6973, 500, 1319)
    prompts = [{example.prompt for example in split} for split in (task.train, task.validation, task.test)]
    assert sum(map(len, prompts)) == len(set.union(*prompts)) == 7473 + 1319
    assert sum(task.score(example.solution, example.gold) for example in task.test) == 1319
    assert all("<<" not in example.solution for example in task.train)
    assert task.test[0].gold == "18"
    assert len(tl.load_task("gsm8k", data=DATA, validation=0).train) == 7473


@needs_data
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("name", "count", "first"), [("aime24", 30, "204"), ("amc23", 40, "27")])
def test_the_real_competitions(name, count, first):
    task = tl.load_task(name, data=DATA)
    assert len(task.test) == count
    assert task.test[0].gold == first
    for example in task.test:
        for written in (example.gold, f"{int(example.gold)}", f"{int(example.gold)}.0"):
            assert task.score(rf"\boxed{{{written}}}", example.gold) == 1.0
        assert task.score(rf"\boxed{{{int(example.gold) + 1}}}", example.gold) == 0.0
        assert task.lenient(f"The answer is {int(example.gold)}.", example.gold) == 1.0
