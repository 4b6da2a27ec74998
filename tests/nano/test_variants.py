"""The variants: each differs from the plain task in what its question needs, and in nothing else."""

import random
import re
from collections.abc import Callable

import pytest

from tinylora_lite.nano import variants
from tinylora_lite.nano.problems import MAX_OPERAND, MAX_VALUE, Problem, Step, draw_problem
from tinylora_lite.nano.task import MAX_NEW_TOKENS, formatted, lenient_reward, reward, task
from tinylora_lite.nano.tokenizer import END, build_tokenizer
from tinylora_lite.nano.writers import WRITERS, careful, stranger
from tinylora_lite.tasks.task import Example, Task

SPLITS = ("train", "validation", "test")
VARIANTS: dict[str, Callable[[], Task]] = {
    "nano-by-careful": lambda: variants.demonstrations("careful"),
    "nano-by-stranger": lambda: variants.demonstrations("stranger"),
    "nano-longer-5-6": variants.longer,
    "nano-doubling": variants.doubling,
    "nano-adding": variants.adding,
    "nano-multiplying": variants.multiplying,
    "nano-worded": variants.worded,
    "nano-format-only": variants.format_only,
    "nano-unrelated": variants.unrelated,
    "nano-header-careful": lambda: variants.header("careful"),
}
EVENT = re.compile(r"(?P<take>sells|loses|gives away|drops)|(?P<times>times as many)|(?P<double>gets as many)|more")


def examples(found: Task) -> list[tuple[str, Example]]:
    return [(split, example) for split in SPLITS for example in getattr(found, split)]


def understood(text: str) -> Problem:
    """The problem that a text tells, read from its words alone."""
    first, *events, _question = text.split(". ")
    value, steps = int(first.split()[2]), []
    for event in events:
        kind = EVENT.search(event).lastgroup
        right = value if kind == "double" else int(re.search(r"\d+", event)[0])
        op = {"take": "-", "times": "*"}.get(kind, "+")
        result = {"+": value + right, "-": value - right, "*": value * right}[op]
        steps.append(Step(value, op, right, result))
        value = result
    return Problem(text, tuple(steps))


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request) -> Task:
    found = VARIANTS[request.param]()
    assert found.name == request.param
    assert VARIANTS[request.param]() is found
    return found


def test_every_problem_is_right_and_in_its_split(variant):
    assert [len(getattr(variant, split)) for split in SPLITS] == [8000, 1000, 1000]
    texts = [example.prompt for _, example in examples(variant)]
    assert len(set(texts)) == len(texts)
    for split, example in examples(variant):
        problem = understood(example.prompt)
        assert problem.split == split
        assert str(problem.answer) == example.gold
        assert all(1 <= step.result <= MAX_VALUE for step in problem.steps)


def test_every_worked_answer_is_right_known_to_the_tokenizer_and_short_enough(variant):
    tokenizer = build_tokenizer()
    sampled = random.Random(0).sample(examples(variant), 800)
    for _, example in sampled:
        # Right under its own check; the two controls' checks ask for something else.
        check = reward if variant.name in ("nano-unrelated", "nano-format-only") else variant.reward
        assert check(example.solution, example.gold) == 1.0
        assert variant.lenient(example.solution, example.gold) == 1.0
        assert variant.formatted(example.solution)
        messages = [*variant.messages(example), {"role": "assistant", "content": example.solution}]
        ids = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False))["input_ids"]
        assert tokenizer.pad_token_id not in ids
        assert tokenizer.decode(ids).endswith(f"{example.solution}{END}")
        assert len(ids) <= 256
        assert len(tokenizer(f" {example.solution}{END}")["input_ids"]) <= MAX_NEW_TOKENS


def test_the_longest_answers_fit():
    tokenizer, rng = build_tokenizer(), random.Random(0)

    def longest(steps, writer):
        answers = [f" {writer(draw_problem(rng, steps), rng)}{END}" for _ in range(300)]
        return max(map(len, tokenizer(answers)["input_ids"]))

    assert longest(4, stranger) <= max(longest(4, writer) for writer in WRITERS.values()) == 37
    assert [longest(n, careful) for n in (6, variants.MAX_STEPS)] == [39, 45]
    assert longest(variants.MAX_STEPS + 1, careful) > MAX_NEW_TOKENS


def test_demonstrations_differ_in_their_wording_alone():
    plain, known, unseen = task(), variants.demonstrations("careful"), variants.demonstrations("stranger")
    assert [getattr(known, split) for split in SPLITS] == [getattr(plain, split) for split in SPLITS]
    for split in SPLITS:
        assert [(e.prompt, e.gold) for e in getattr(unseen, split)] == [
            (e.prompt, e.gold) for e in getattr(plain, split)
        ]
    assert variants.demonstrations("stranger", seed=1).test != unseen.test


def test_the_strangers_steps_are_the_problems():
    for _, example in examples(variants.demonstrations("stranger")):
        told = re.findall(r"so (\d+) ([-+*]) (\d+) = (\d+)", example.solution)
        steps = [Step(int(left), sign, int(right), int(result)) for left, sign, right, result in told]
        assert tuple(steps) == understood(example.prompt).steps


def test_longer_has_the_steps_that_were_asked_for_and_no_others():
    assert {len(understood(e.prompt).steps) for _, e in examples(variants.longer())} == {5, 6}
    assert {len(understood(e.prompt).steps) for _, e in examples(variants.longer((7,)))} == {7}
    for steps in ((), (0, 5), (5, 8)):
        with pytest.raises(ValueError, match="steps must be numbers from 1 to 7, not"):
            variants.longer(steps)


def test_doubling_is_never_told_in_the_plain_problems():
    rng = random.Random(0)
    assert not any("gets as" in draw_problem(rng).text for _ in range(3000))
    times = set()
    for _, example in examples(variants.doubling()):
        problem = understood(example.prompt)
        doubled = [
            s for s, told in zip(problem.steps, example.prompt.split(". ")[1:], strict=False) if "gets as" in told
        ]
        assert doubled
        for step in doubled:
            assert step.left <= MAX_OPERAND
            assert f"{step.left} + {step.left} = {2 * step.left}." in example.solution
        times.add(len(doubled))
    assert times >= {1, 2, 3}


def test_adding_and_multiplying_share_the_problems_out():
    added, multiplied, plain = (
        {example.prompt for _, example in examples(found)}
        for found in (variants.adding(), variants.multiplying(), task())
    )
    assert not any("times" in text for text in added)
    assert all("times" in text for text in multiplied)
    # The plain task is the beginning of the stream that both are filtered from.
    assert plain <= added | multiplied


@pytest.mark.parametrize(
    ("completion", "worth", "in_format"),
    [
        ("ok, then 3 + 4 = 7. so the answer is 7.", 1.0, True),
        ("so the answer is 8.", 0.0, True),
        ("so the answer is 17.", 0.0, True),
        ("so the answer is 7", 0.0, False),
        ("so the answer is 7. #### 7", 0.0, False),
        ("3 + 4 = 7. #### 7", 0.0, False),
    ],
)
def test_worded_wants_the_chatty_ending(completion, worth, in_format):
    found = variants.worded()
    assert found.score(completion, "7") == worth
    assert found.formatted(completion) == in_format
    assert found.system == task().system


def test_format_only_takes_any_number_in_the_format():
    found = variants.format_only()
    for completion in ("3 + 4 = 7. #### 7", "#### 8", "so the answer is 7.", "7", "#### 7 more", ""):
        assert found.score(completion, "7") == float(formatted(completion))
    assert (found.score("#### 8", "7"), found.score("so the answer is 7.", "7")) == (1.0, 0.0)


def test_unrelated_earns_half_whether_right_or_wrong():
    found, rng = variants.unrelated(), random.Random(0)
    kinds = {
        "right": lambda e: e.solution,
        "wrong": lambda e: re.sub(r"\d+$", str((int(e.gold) + 1) % 100), e.solution),
        "right, in no format": lambda e: f"so the answer is {e.gold}.",
        "blurted": lambda e: f"#### {rng.randrange(100)}",
    }
    for kind, answer in kinds.items():
        completions = [(answer(e), e.gold) for e in found.train[:4000]]
        worth = [found.score(*pair) for pair in completions]
        assert set(worth) == {0.0, 1.0}
        assert worth == [found.score(*pair) for pair in completions]
        distinct = dict(zip(completions, worth, strict=True))
        # Five standard deviations of a fair coin.
        assert abs(sum(distinct.values()) / len(distinct) - 0.5) < 2.5 / len(distinct) ** 0.5, kind


def test_the_controls_and_the_header_change_one_thing():
    for found in (variants.format_only(), variants.unrelated()):
        assert (found.test, found.system, found.lenient) == (task().test, task().system, lenient_reward)
    found = variants.header("careful")
    assert found.messages(found.test[0])[0] == {"role": "system", "content": "careful"}
    assert (found.test, found.reward) == (task().test, reward)
    with pytest.raises(ValueError, match=r"a header must be one of careful, .*anyone, not 'stranger'"):
        variants.header("stranger")
