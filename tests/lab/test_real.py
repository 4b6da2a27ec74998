"""Real bases in the lab: found by hash, trials that go on, answers that are kept, rates chosen with caution."""

import hashlib
import shutil
from dataclasses import replace

import pytest

from tinylora_lite import nano
from tinylora_lite.adapter.adapter import attach
from tinylora_lite.evaluation.evaluate import evaluate
from tinylora_lite.lab import real, running, scoring
from tinylora_lite.lab.baselines import favour_one_logit, search_v, train_added
from tinylora_lite.lab.bases import config_of
from tinylora_lite.lab.claims import claim_of
from tinylora_lite.lab.estimate import Estimate
from tinylora_lite.lab.plan import missing
from tinylora_lite.lab.real import load_base
from tinylora_lite.lab.registered import Cautious, choice_and_sum, over_sums, paired
from tinylora_lite.lab.store import Store
from tinylora_lite.lab.tasks import task_of
from tinylora_lite.lab.trial import LINES, REAL, Trial, settings_of

TRIAL = Trial(base="tiny", task="words-1", n_tie=4, prompts=2, steps=2, split="validation")


@pytest.fixture
def gguf(tmp_path, monkeypatch):
    """A nano base in the place of a real one."""
    monkeypatch.setenv("TINYLORA_CACHE", str(tmp_path))
    monkeypatch.setitem(REAL, "tiny", hashlib.sha256(b"tiny").hexdigest())
    monkeypatch.setattr(scoring, "SWEEP_PROBLEMS", 8)
    monkeypatch.setattr(real, "load_model", lambda *_, **__: nano.load("qwen2-0.4m")[0])
    monkeypatch.setattr(real, "load_tokenizer", lambda _: nano.load("qwen2-0.4m")[1])
    file = tmp_path / "lab" / "bases" / "tiny.gguf"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"tiny")
    return file


def test_another_file_or_none_is_refused(gguf, monkeypatch):
    model, _ = load_base("tiny")
    assert not model.training
    monkeypatch.setitem(REAL, "tiny", "cd34")
    with pytest.raises(ValueError, match=r"tiny.gguf has the SHA-256 .*; tiny is the one with cd34"):
        load_base("tiny")
    gguf.unlink()
    with pytest.raises(FileNotFoundError, match=r"tiny is read from .*tiny.gguf"):
        load_base("tiny")


@pytest.mark.parametrize("numbers", ["random", "LoRA"])
def test_a_trial_that_was_stopped_goes_on_after_its_last_step(gguf, monkeypatch, numbers):
    trial = replace(TRIAL, numbers=numbers)
    (whole,) = running.run_trials([trial])
    assert whole["file_sha256"] == REAL["tiny"]
    assert whole["steps"]["reward"] == pytest.approx(whole["curve"], abs=1e-4)
    assert len(whole["curve"]) == len(whole["steps"]["norm"]) == 2
    shutil.rmtree(gguf.parents[1] / "runs")
    with monkeypatch.context() as patch:
        patch.setattr(running, "evaluate", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            running.run_trials([trial])
    with monkeypatch.context() as patch:
        patch.setattr("tinylora_lite.training.loop.update", None)  # not called again
        (resumed,) = running.run_trials([trial])
    same = ("curve", "scores", "vectors", "norm", "parameters", "tokens")
    assert {key: resumed[key] for key in same} == {key: whole[key] for key in same}


def test_a_test_keeps_its_answers_and_what_each_earned_beside_the_record(gguf, monkeypatch, tmp_path):
    task = task_of("words-1", "tiny")
    monkeypatch.setattr(running, "task_of", lambda *_: replace(task, test=task.test[:6]))
    monkeypatch.setattr(scoring, "task_of", lambda *_: replace(task, test=task.test[:6]))
    trial = replace(TRIAL, method="none", split="test")
    (record,) = running.run_trials([trial])
    store = Store(tmp_path / "records")
    store.add(trial, record)
    assert "answers" not in Store(tmp_path / "records")[trial]
    for name, kept in store.answers(trial).items():
        score = record["scores"][name]
        assert len(kept["texts"]) == len(kept["strict"]) == 6
        assert kept["strict"].count("1") / 6 == score["accuracy"]
        assert kept["lenient"].count("1") / 6 == score["lenient"]
        right = [task.score(text, example.gold) for text, example in zip(kept["texts"], task.test, strict=False)]
        assert all(earned == "0" or worth for earned, worth in zip(kept["strict"], right, strict=True))


FLOOR = Trial(base="smollm2-135m", method="none", task="words-1", learning_rate=0.0, seed=100, split="validation")


@pytest.mark.parametrize(
    ("accuracy", "chosen"),
    [
        ({0.05: 0.2, 0.1: 0.3, 0.2: 0.25}, 0.1),
        ({0.05: 0.2, 0.1: 0.3, 0.2: 0.05}, 0.05),  # beside a rate that diverges
        ({0.05: 0.2, 0.1: 0.3, 0.2: 0.4, 0.4: 0.02}, 0.1),
        ({0.05: 0.01, 0.1: 0.02, 0.2: 0.01}, 0.05),
    ],
)
def test_a_rate_is_not_taken_beside_one_that_diverges(tmp_path, accuracy, chosen):
    trial, store = Trial(base="smollm2-135m", task="words-1"), Store(tmp_path)
    point = Cautious("x", trial, (0.05, 0.1, 0.2), 2, sweep_seeds=2, reach=1, sweep_from=100)
    while trials := missing(point, store):
        for trial in trials:
            assert trial.seed in (100, 101)
            store.add(trial, {"scores": {"sampled": {"accuracy": accuracy.get(trial.learning_rate, 0.0)}}})
    assert point.rate(store) is None  # until it is known what the untrained model has
    store.add(FLOOR, {"scores": {"sampled": {"accuracy": 0.2}}})
    assert point.rate(store) == chosen


@pytest.mark.parametrize(("name", "base", "task"), [("smollm2", "smollm2-135m", 1), ("qwen", "qwen2.5-coder-0.5b", 2)])
def test_the_sweep_of_prompts_scores_what_a_rate_is_compared_with(name, base, task):
    best = {point.label: point for point in claim_of(f"real-{name}").points}["untrained, best of five prompts"]
    assert replace(FLOOR, base=base, task=f"words-{task}") in best.sweep(best.rates)


def filled(claim, tmp_path, digits):
    """A store with the runs of the compared points; ``digits`` says which test problems a point's seed gets right."""
    store, points = Store(tmp_path), {point.label: point for point in claim.points}
    store.add(FLOOR, {"scores": {"sampled": {"accuracy": 0.2}}})
    for label in ("untrained", "13 random", "LoRA, r = 1"):
        point = points[label]
        while point.rate(store) is None:
            for trial in point.sweep(point.swept(store)[0]):
                store.add(trial, {"scores": {"sampled": {"accuracy": 0.2}}})
        for trial in point.tests(point.rate(store)):
            right = digits(label, trial.seed)
            scores = {"sampled": {"accuracy": 0.9}, "greedy": {"accuracy": 0.8, "lenient": right.count("1") / 1000}}
            record = {"scores": scores, "parameters": 13, "answers": {"greedy": {"lenient": right}}}
            store.add(trial, record)
    return store, points["13 random"], points["untrained"]


def first_right(count):
    return "1" * count + "0" * (1000 - count)


def test_the_primary_comparison_is_of_greedy_answers_read_leniently(tmp_path):
    gains = {"untrained": [0], "13 random": [100, 120, 140, 100, 140], "LoRA, r = 1": [200, 240, 280, 200, 280]}
    claim = claim_of("real-smollm2")
    store, thirteen, base = filled(claim, tmp_path, lambda label, seed: first_right(300 + gains[label][seed]))
    assert paired(thirteen, base, store).mean == pytest.approx(0.12)
    assert over_sums(thirteen, base, store).mean == pytest.approx(0.12)
    ours, finding = claim.judge(store)
    assert finding == "reproduced"
    assert ours.startswith("They help: ")
    assert "share 50%" in ours


def test_a_gain_on_the_problems_of_a_single_sum_helps_over_draws_and_not_over_sums(tmp_path):
    """Every draw of P gains the same 50 problems or so, all of which ask for one sum."""
    claim = claim_of("real-smollm2")
    asked = [example.solution for example in task_of("words-1", "any").test]
    often = max(set(asked), key=asked.count)

    def digits(label, seed):
        places = [i for i, sum_ in enumerate(asked) if sum_ == often][seed:] if label != "untrained" else []
        return "".join("01"[i in places] for i in range(1000))

    store, thirteen, base = filled(claim, tmp_path, digits)
    draws, sums = paired(thirteen, base, store), over_sums(thirteen, base, store)
    assert draws.mean == pytest.approx(sums.mean)
    assert draws.low > 0.04
    assert sums.low < 0 < sums.high
    ours, finding = claim.judge(store)
    assert ours.startswith("Undecided: ")
    assert finding == "not testable at this size"


def test_a_small_gain_without_a_clear_sign_is_said_to_be_small(tmp_path):
    digits = {"untrained": first_right(300), "LoRA, r = 1": first_right(300)}
    claim = claim_of("real-smollm2")
    store, *_ = filled(claim, tmp_path, lambda label, seed: digits.get(label) or first_right(298 + seed))
    assert claim.judge(store).ours.startswith("Undecided, and not by much within this budget: ")


def test_over_sums_that_all_differ_the_interval_is_students(tmp_path, monkeypatch):
    task = task_of("words-1", "any")
    own = tuple(replace(example, solution=str(i)) for i, example in enumerate(task.test))
    monkeypatch.setattr("tinylora_lite.lab.tasks.task_of", lambda *_: replace(task, test=own))
    right = {"untrained": first_right(300)}
    store, thirteen, base = filled(
        claim_of("real-smollm2"), tmp_path, lambda label, seed: right.get(label) or first_right(200 + 70 * seed)
    )
    found = over_sums(thirteen, base, store)
    expected = Estimate.of_differences(found.values)
    assert (found.mean, found.low, found.high) == pytest.approx((expected.mean, expected.low, expected.high))


def test_a_gain_is_split_into_the_choice_of_operators_and_the_sums(tmp_path):
    claim, store = claim_of("real-smollm2"), Store(tmp_path)
    problems, base = task_of("words-1", "any").test, claim.points[0]
    texts = [example.solution or "" for example in problems]
    texts[:200] = ["1 / 2 = 3\n#### 3"] * 200  # another operator, and right for all that
    record = {"scores": {}, "answers": {"greedy": {"texts": texts, "lenient": "1" * 400 + "0" * 600}}}
    store.add(base.tests(base.rate(store))[0], record)
    assert choice_and_sum(base, store) == pytest.approx((0.8, 200 / 800))


def test_what_trains_nothing_is_chosen_by_greedy_answers_and_may_be_a_prompt(tmp_path):
    points, store = {point.label: point for point in claim_of("real-smollm2").points}, Store(tmp_path)
    best = points["untrained, best of five prompts"]
    assert len(best.rates) == 5
    for trial in missing(best, store):
        assert (trial.split, trial.seed, trial.method) == ("validation", 100, "none")
        greedy = 0.3 + 0.1 * (trial.task == "words-1, eight shown")
        store.add(trial, {"scores": {"sampled": {"accuracy": 0.5 - greedy}, "greedy": {"accuracy": greedy}}})
    assert [(trial.task, trial.split) for trial in missing(best, store)] == [("words-1, eight shown", "test")]


@pytest.mark.parametrize("steps", [1, 2])
def test_other_prompts_ask_for_the_same_problems(steps):
    plain, line = task_of(f"words-{steps}", "any"), LINES["told to choose"]
    told, eight = (task_of(f"words-{steps}, {kind}", "any") for kind in ("told to choose", "eight shown"))
    first, *_ = plain.test
    assert told.messages(told.test[0])[-1]["content"] == f"{line}\n{first.prompt}"
    assert told.messages(told.test[0])[0]["content"].startswith(line)
    assert [example.gold for example in told.test] == [example.gold for example in plain.test]
    assert eight.test == plain.test
    assert len(eight.shots) == 8
    assert not {shot.solution for shot in eight.shots} & {
        example.solution for example in (*plain.validation, *plain.test)
    }


def test_untrained_answers_can_be_sampled_at_another_temperature(gguf, monkeypatch):
    scored = []
    monkeypatch.setattr(running, "evaluate", lambda *_, **how: scored.append(how["temperature"]) or 1 / 0)
    for trial in (replace(TRIAL, method="none", temperature=0.5), replace(TRIAL, method="none", split="test")):
        with pytest.raises(ZeroDivisionError):
            running.run_trials([trial])
    assert scored == [0.5, 1.0]


@pytest.mark.parametrize(("numbers", "parameters"), [("steering vector", 72), ("logits", 163)])
def test_an_added_vector_trains_alone_and_goes_on_after_its_last_step(gguf, numbers, parameters, tmp_path):
    model, tokenizer = load_base("tiny")
    task = replace(task_of("nano", "tiny"), reward=lambda text, gold: float(len(text) % 2))
    settings = settings_of(replace(TRIAL, numbers=numbers, prompts=4, learning_rate=0.1))
    before = {name: value.clone() for name, value in model.named_parameters()}
    run = train_added(model, tokenizer, task, settings, numbers, tmp_path / "run")
    changed = {name for name, value in model.named_parameters() if name not in before or not value.equal(before[name])}
    place = "lm_head.bias" if numbers == "logits" else "model.layers.3.mlp.down_proj.bias"
    assert changed == {place}
    assert run.parameters == model.get_parameter(place).numel() == parameters
    assert model.get_parameter(place).abs().max() > 0.1  # Adam's two steps, at 0.1 and half of it
    again, _ = load_base("tiny")
    train_added(again, tokenizer, task, settings, numbers, tmp_path / "run")
    assert again.get_parameter(place).equal(model.get_parameter(place))


def test_one_logit_is_that_of_a_token_that_decides_the_reward(gguf):
    """Where answers without "####" are rewarded, its bias makes them the rule."""
    model, tokenizer = load_base("tiny")
    task = replace(task_of("nano", "tiny"), reward=lambda text, gold: float("####" not in text))
    settings = settings_of(replace(TRIAL, task="nano", prompts=8, steps=4, learning_rate=3.0))
    run, found = favour_one_logit(model, tokenizer, task, settings)
    assert model.lm_head.bias[int(found[0])] == found[1]
    assert abs(float(found[1])) == 3.0
    after = evaluate(model, tokenizer, task, split="validation", problems=64, max_new_tokens=48).accuracy
    assert after > run.steps[0]["reward"] + 0.3
    assert run.parameters == 1
    assert len(run.steps) == 4
    assert model.lm_head.bias.count_nonzero() == 1


def test_the_best_v_of_a_search_is_the_one_with_the_highest_reward_and_zero_is_among_them(gguf):
    model, tokenizer = load_base("tiny")
    task = task_of("nano", "tiny")
    trial = replace(TRIAL, task="nano", prompts=4, steps=4, learning_rate=0.5)
    adapter = attach(model, config_of(trial))
    run, v = search_v(model, tokenizer, adapter, task, settings_of(trial))
    rewards = [row["reward"] for row in run.steps]
    assert len(rewards) == 4
    assert run.steps[-1]["norm"] == pytest.approx(float(v.norm()))
    assert float(v.norm()) == pytest.approx(0.5 if rewards.index(max(rewards)) else 0.0)
    never = replace(task, reward=lambda text, gold: 0.0)
    assert not search_v(model, tokenizer, adapter, never, settings_of(trial))[1].any()


@pytest.mark.parametrize(
    ("method", "numbers", "parameters"),
    [("search", "random", 13), ("one logit", "logits", 1), ("grpo", "steering vector", 72)],
)
@pytest.mark.parametrize("ends", [False, True])
def test_the_baselines_run_as_trials(gguf, monkeypatch, method, numbers, parameters, ends):
    if ends:
        monkeypatch.setattr(running, "evaluate", lambda *_, **__: (_ for _ in ()).throw(FloatingPointError))
    (record,) = running.run_trials([replace(TRIAL, method=method, numbers=numbers, learning_rate=0.1)])
    assert record["parameters"] == parameters
    assert record.get("diverged", False) is ends
    assert set(record["scores"]) == ({"sampled", "greedy"} if method == "one logit" else {"sampled"})
