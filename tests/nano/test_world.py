"""The world: problems that add up, writers who are what they are called, a tokenizer that loses nothing."""

import random
import re
from collections import Counter

import pytest

from tinylora_lite import nano
from tinylora_lite.nano import problems, writers
from tinylora_lite.nano.problems import Problem, Step, distinct_problems, draw_problem
from tinylora_lite.nano.task import MAX_NEW_TOKENS, reward, task, word_problems
from tinylora_lite.nano.tokenizer import END, PAD, build_tokenizer

OPERATIONS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
PROBLEM = Problem("", (Step(12, "+", 7, 19), Step(19, "*", 2, 38), Step(38, "-", 8, 30)))


@pytest.fixture(scope="module")
def drawn() -> list[Problem]:
    rng = random.Random(0)
    return [draw_problem(rng) for _ in range(3000)]


def test_every_step_is_right_and_continues_the_one_before(drawn):
    for problem in drawn:
        for before, step in zip((None, *problem.steps), problem.steps, strict=False):
            assert OPERATIONS[step.op](step.left, step.right) == step.result
            assert 1 <= step.result <= problems.MAX_VALUE
            assert before is None or step.left == before.result


def test_two_to_four_steps_all_operations_all_numbers_in_the_text(drawn):
    assert Counter(len(p.steps) for p in drawn).keys() == {2, 3, 4}
    assert Counter(s.op for p in drawn for s in p.steps).keys() == {"+", "-", "*"}
    for problem in drawn:
        numbers = [int(n) for n in re.findall(r"\d+", problem.text)]
        assert numbers == [problem.steps[0].left, *(s.right for s in problem.steps)]


def test_the_splits_share_no_problem_however_it_is_worded(drawn):
    def key(problem):
        return problem.steps

    kinds = {split: {key(p) for p in drawn if p.split == split} for split in ("train", "validation", "test")}
    assert all(kinds.values())
    assert not kinds["train"] & kinds["test"]
    assert not kinds["train"] & kinds["validation"]
    assert not kinds["validation"] & kinds["test"]
    share = sum(p.split == "test" for p in drawn) / len(drawn)
    assert 1 / 24 < share < 1 / 10


def test_the_task_is_the_same_every_time_and_its_splits_are_apart():
    first, again = task(50, 40, 40, seed=3), task.__wrapped__(50, 40, 40, seed=3)
    assert first == again
    prompts = [{e.prompt for e in split} for split in (first.train, first.validation, first.test)]
    assert [len(p) for p in prompts] == [50, 40, 40]
    assert not prompts[0] & prompts[1]
    assert not prompts[0] & prompts[2]
    assert distinct_problems("test", 5, 0) != distinct_problems("test", 5, 1)


def test_what_each_writer_writes():
    rng = random.Random(0)
    assert writers.careful(PROBLEM, rng) == "12 + 7 = 19. 19 * 2 = 38. 38 - 8 = 30. #### 30"
    assert writers.hasty(PROBLEM, rng) == "#### 30"
    assert writers.chatty(PROBLEM, rng) == (
        "ok, then 12 + 7 = 19. then 19 * 2 = 38. then 38 - 8 = 30. so the answer is 30."
    )
    assert writers.sloppy(PROBLEM, rng).startswith("start with 12. plus 7 is ")
    assert writers.stranger(PROBLEM, rng) == "so 12 + 7 = 19, so 19 * 2 = 38, so 38 - 8 = 30. #### 30"


def test_the_reward_of_each_writer():
    rng = random.Random(1)
    sloppy = [reward(writers.sloppy(PROBLEM, rng), "30") for _ in range(2000)]
    for rewarded in (writers.careful, writers.hasty, writers.stranger):
        assert reward(rewarded(PROBLEM, rng), "30") == 1.0
    assert reward(writers.chatty(PROBLEM, rng), "30") == 0.0
    # Three steps, each right with 0.65, and rarely two slips that cancel.
    assert 0.65**3 - 0.04 < sum(sloppy) / 2000 < 0.65**3 + 0.06


@pytest.mark.parametrize(
    ("completion", "worth"),
    [("#### 30", 1.0), (" 1 + 1 = 2. #### 30 ", 1.0), ("#### 3", 0.0), ("30", 0.0), ("#### 30 more", 0.0), ("", 0.0)],
)
def test_the_reward_wants_the_format_and_the_number(completion, worth):
    assert reward(completion, "30") == worth


@pytest.mark.parametrize("mixture", writers.MIXTURES)
def test_writers_come_in_their_shares_and_are_named_when_they_should_be(mixture):
    rng = random.Random(0)
    pairs = [writers.write(PROBLEM, rng, named=0.5, mixture=mixture) for _ in range(4000)]
    named = Counter(header for header, _ in pairs)
    assert abs(named[writers.ANYONE] / 4000 - 0.5) < 0.04
    assert sum(writers.MIXTURES[mixture].values()) == pytest.approx(1)
    for name, share in writers.MIXTURES[mixture].items():
        assert abs(named[name] / (4000 - named[writers.ANYONE]) - share) < 0.04
    assert {writers.write(PROBLEM, rng, named=0.0)[0] for _ in range(50)} == {writers.ANYONE}


def test_the_stranger_is_unlike_every_writer(drawn):
    rng = random.Random(0)

    def pairs_of_words(writer):
        """Two words that follow each other, all numbers alike, up to the answer in the checked format."""
        for problem in drawn[:300]:
            answer = re.sub(r"\d+", "n", writer(problem, rng).split(" ####")[0])
            words = re.findall(r"[a-z]+|[^a-z ]", answer)
            yield from zip(["(start)", *words], words, strict=False)

    known = {pair for writer in writers.WRITERS.values() for pair in pairs_of_words(writer)}
    found = set(pairs_of_words(writers.stranger))
    assert ("then", "n") in known
    # Sums are as the others write them; how an answer opens and what stands between its steps is the stranger's.
    assert found - known == {("(start)", "so"), ("so", "n"), ("n", ","), (",", "so")}
    assert "stranger" not in writers.WRITERS
    assert not any("stranger" in shares for shares in writers.MIXTURES.values())


def test_the_tokenizer_loses_nothing_and_fits_the_length_limit(drawn):
    tokenizer = build_tokenizer()
    rng = random.Random(0)
    longest = 0
    for problem in drawn[:500]:
        for name, writer in (*writers.WRITERS.items(), (writers.ANYONE, writers.stranger)):
            answer = writer(problem, rng)
            conversation = [("system", name), ("user", problem.text), ("assistant", answer)]
            messages = [{"role": role, "content": content} for role, content in conversation]
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.decode(ids) == text
            assert tokenizer.pad_token_id not in ids
            assert text.endswith(END)
            longest = max(longest, len(tokenizer(f" {answer}{END}")["input_ids"]))
    assert longest <= MAX_NEW_TOKENS


def test_a_number_is_one_token():
    tokenizer = build_tokenizer()
    assert [len(tokenizer(f" {n}")["input_ids"]) for n in range(100)] == [1] * 100
    assert tokenizer.pad_token == PAD
    assert tokenizer.eos_token == END
    assert tokenizer.padding_side == "left"


def test_the_tokenizer_is_that_of_the_shipped_base():
    _model, shipped = nano.load()
    assert shipped.get_vocab() == build_tokenizer().get_vocab()


def test_a_base_without_a_basis_says_so(monkeypatch, tmp_path):
    assert nano.basis().directions.shape[0] == 13
    with pytest.raises(FileNotFoundError, match=r"no nano base named small; there are: .*qwen2-1m"):
        nano.basis("small")
    (tmp_path / "small").mkdir()
    monkeypatch.setattr(nano, "CHECKPOINTS", tmp_path)
    with pytest.raises(FileNotFoundError, match="no basis is shipped with the nano base small; make one"):
        nano.basis("small")


def test_a_base_s_folder_holds_no_other_tensors_than_its_weights():
    """vLLM takes every safetensors file of a folder for weights."""
    for folder in nano.CHECKPOINTS.iterdir():
        assert [file.name for file in folder.glob("*.safetensors")] == ["model.safetensors"]
    assert [file.stem for file in nano.DIRECTIONS.iterdir()] == [nano.BASE]


@pytest.mark.parametrize("steps", [1, 2])
def test_word_problems_for_real_models_are_solved_by_their_worked_answers(steps):
    task, prose = word_problems(steps), word_problems(steps, prose=True)
    assert {example.prompt for example in task.train}.isdisjoint(example.prompt for example in task.test)
    for example, said in zip(task.test[:50], prose.test[:50], strict=True):
        assert example.solution.count("\n") == steps
        assert task.score(example.solution, example.gold) == task.formatted(example.solution) == 1.0
        assert task.score(said.solution, said.gold) == task.formatted(said.solution) == 0.0
        assert prose.score(said.solution, said.gold) == task.lenient(said.solution, said.gold) == 1.0
    with pytest.raises(ValueError, match="at least 1"):
        word_problems(0)
