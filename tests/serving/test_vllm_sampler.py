"""vLLM in the process that trains answers as the model itself does, after every kind of synchronisation.

`make test-vllm` sets up a Python that has vLLM and runs these tests with it in ``VLLM_PYTHON``.
"""

import json
import os
import statistics
from itertools import pairwise

import pytest

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif("VLLM_PYTHON" not in os.environ, reason="needs vLLM: run `make test-vllm`"),
]

TOLERANCE = 1e-3
WAYS = ["lora", "merged", "in place"]
GREEDY = ["base, before the first sync", "everywhere", "short", "somewhere", "base again", "cache reset"]


@pytest.fixture(scope="module", params=WAYS)
def result(request, tmp_path_factory, vllm_python):
    folder = tmp_path_factory.mktemp("sampler")
    vllm_python("sample_vllm.py", request.param, folder)
    found = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    print(f"{request.param}: ready after {found['seconds to start']:.1f} s, sync {found['seconds of a sync']:.3f} s")
    return {"way": request.param} | found


def farthest(one: list[list[float]], other: list[list[float]]) -> float:
    return max(abs(a - b) for row, its in zip(one, other, strict=True) for a, b in zip(row, its, strict=True))


@pytest.mark.parametrize("stage", GREEDY)
def test_greedy_answers_are_those_of_the_model(result, stage):
    ours, theirs = result[stage]["ours"], result[stage]["vllm"]
    for part in ("tokens", "mask", "truncated", "texts"):
        assert theirs[part] == ours[part], part
    gap = farthest(ours["logprobs"], theirs["logprobs"])
    print(f"{result['way']}, {stage}: within {gap:.1e}")
    assert gap < TOLERANCE
    assert theirs["entropies"] == [[-p for p in row] for row in theirs["logprobs"]]


def test_the_adapters_and_the_base_answer_differently(result):
    said = [result[stage]["vllm"]["texts"] for stage in ("everywhere", "somewhere", "base again")]
    same = [sum(a == b for a, b in zip(one, other, strict=True)) for one, other in pairwise(said)]
    assert max(same) < len(said[0]) / 2
    assert result["base again"]["vllm"]["tokens"] == result["base, before the first sync"]["vllm"]["tokens"]


def test_the_check_says_who_answered(result):
    for verdict, found in result["checked"].items():
        print(f"{result['way']}: {found}")
        assert found["verdict"] == verdict
        assert found["noise"] < TOLERANCE


def test_answers_stop_at_either_end_token_or_at_the_limit(result):
    found = result["everywhere"]["vllm"]
    last = {row[sum(mask) - 1] for row, mask in zip(found["tokens"], found["mask"], strict=True)}
    assert result["also ends"] in last
    assert len(last) == 2
    assert 0 < sum(result["short"]["vllm"]["truncated"]) < len(result["short"]["vllm"]["truncated"])


@pytest.mark.parametrize("name", ["drawn", "drawn otherwise", "drawn at 1"])
def test_the_odds_of_what_is_drawn_are_those_of_the_model_at_the_temperature(result, name):
    assert farthest(result[name]["odds"], result[name]["vllm"]["logprobs"]) < TOLERANCE


def test_a_seed_makes_its_samples_again_in_one_batch_or_in_parts(result):
    drawn, otherwise = (result[name]["vllm"]["tokens"] for name in ("drawn", "drawn otherwise"))
    assert result["drawn again"]["vllm"]["tokens"] == drawn
    assert sum(a[: len(b)] == b[: len(a)] for a, b in zip(drawn, otherwise, strict=True)) < len(drawn) / 2
    parts = [[token for token in row if token] for row in result["drawn in two parts"]]  # 0 pads
    assert parts == [[token for token in row if token] for row in drawn]


def test_nothing_grows_with_the_number_of_swaps(result):
    expected = [1, 1] if result["way"] == "lora" else [0, 1]
    assert result["held after each swap"] == [expected] * 30
    assert result["held by the base"] == expected


def test_without_the_reset_the_cache_answers_for_weights_that_are_gone(result):
    ours, theirs = result["cache kept"]["ours"], result["cache kept"]["vllm"]
    stale = theirs["tokens"] != ours["tokens"] or farthest(ours["logprobs"], theirs["logprobs"]) > 2 * TOLERANCE
    assert stale


def test_the_process_keeps_its_random_state_and_its_environment(result):
    assert result["random state kept"]
    assert result["environment kept"]


def test_errors_say_what_to_do(result):
    errors = result["errors"]
    assert "133 tokens and 256 new ones exceed vLLM's max_model_len of 256" in errors["too long"]
    if result["way"] == "lora":
        assert errors["not finite"].startswith("FloatingPointError: the model puts out NaN; lower the learning rate")
        assert "LoRA rank 16 is greater than max_lora_rank 8" in errors["rank"]


@pytest.mark.parametrize("way", ["lora", "merged"])
def test_training_raises_the_reward_as_the_plain_loop_does(way, plain, tmp_path, vllm_python):
    vllm_python("train_vllm.py", way, "0", tmp_path / "steps.json")
    steps = json.loads((tmp_path / "steps.json").read_text(encoding="utf-8"))
    before, after = reached(steps)
    print(f"{way}: {before:.2f} -> {after:.2f}; plain: {', '.join(f'{r:.2f}' for r in plain)}")
    assert after > before + 0.25
    assert min(plain) - 0.1 <= after <= max(plain) + 0.1
    assert max(step["logprob_diff_max"] for step in steps) < TOLERANCE
    assert all(step["tis_clip_frac"] == 0 for step in steps)


@pytest.fixture(scope="module")
def plain(tmp_path_factory, vllm_python):
    """What the plain loop reaches with the same settings, for three seeds."""
    folder = tmp_path_factory.mktemp("plain")
    for seed in range(3):
        vllm_python("train_vllm.py", "transformers", str(seed), folder / f"{seed}.json")
    return [reached(json.loads((folder / f"{seed}.json").read_text(encoding="utf-8")))[1] for seed in range(3)]


def reached(steps: list[dict[str, float]]) -> tuple[float, float]:
    """The mean reward of the first two and of the last six steps."""
    rewards = [step["reward"] for step in steps]
    return statistics.mean(rewards[:2]), statistics.mean(rewards[-6:])
