"""Calibration: orthonormal directions that point where the reward rises, from a model that is left as it was."""

import copy
from typing import ClassVar

import pytest
import torch

import tinylora_lite as tl
from tinylora_lite.adapter.attached import adapter_of
from tinylora_lite.sampling.sampler import ModelSampler

OPTIONS = {"rank": 2, "directions": 3, "problems": 24, "group_size": 8, "max_new_tokens": 3, "truncated": "score"}


@pytest.fixture(scope="module")
def words(task) -> tl.Task:
    """A random model writes such words now and then, so that answers to one problem differ in reward."""

    def reward(completion: str, gold: str) -> float:
        return float("a" in completion)

    return tl.Task("words", task.train, task.validation, task.test, reward)


@pytest.fixture
def calibrate(model, tokenizer, words):
    def call(**options):
        return tl.calibrate(model, tokenizer, words, **OPTIONS | options)

    return call


def test_directions_are_orthonormal_over_all_modules(calibrate):
    basis = calibrate()
    assert basis.directions.shape == (3, 14, 2, 2)
    flat = basis.directions.flatten(1)
    torch.testing.assert_close(flat @ flat.T, torch.eye(3), atol=1e-5, rtol=0)
    assert basis.provenance["problems"] == 24
    assert 3 <= basis.provenance["informative"] <= 24
    spectrum = basis.provenance["spectrum"]
    assert spectrum == sorted(spectrum, reverse=True)


def test_the_model_is_left_as_it_was(calibrate, model):
    before = copy.deepcopy(model.state_dict())
    calibrate()
    assert adapter_of(model) is None
    assert all(p.requires_grad for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_dropout_is_off(make_model, tokenizer, words):
    model = make_model("llama", attention_dropout=0.9)
    calm = tl.calibrate(model, tokenizer, words, **OPTIONS)
    assert torch.equal(tl.calibrate(model.train(), tokenizer, words, **OPTIONS).directions, calm.directions)
    assert model.training


def test_the_seed_decides(calibrate):
    first, again, other = calibrate(seed=1), calibrate(seed=1), calibrate(seed=2)
    assert torch.equal(first.directions, again.directions)
    assert not torch.allclose(first.directions, other.directions, atol=1e-3)


def test_directions_hold_more_of_a_fresh_gradient_than_chance_does(model, tokenizer, words, calibrate):
    def share_of_fresh_gradient(basis: tl.Basis) -> float:
        fresh = tl.calibrate(
            model, tokenizer, words, **OPTIONS | {"directions": 1, "problems": 64, "seed": 9, "passes": 1}
        )
        flat = basis.directions.flatten(1)
        return (flat @ fresh.directions.flatten()).square().sum().item()

    aimed = share_of_fresh_gradient(calibrate(problems=64, passes=1))
    chance = 3 / (14 * 4)
    assert aimed > 5 * chance


def test_a_second_look_changes_the_directions_and_says_how_far_it_went(calibrate):
    one, two = calibrate(passes=1), calibrate(passes=2)
    assert one.provenance["step_size"] == 0
    assert two.provenance["step_size"] >= 0
    assert not torch.allclose(one.directions, two.directions, atol=1e-3)


def test_progress_is_told(calibrate):
    told = []
    calibrate(progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (24, 24)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"passes": 3}, "passes must be 1 or 2"),
        ({"directions": 25}, "24 problems have no 25 directions; calibrate on more, or ask for fewer"),
        ({"directions": 0}, "directions must be an integer of at least 1, not 0"),
        ({"directions": True}, "directions must be an integer of at least 1, not True"),
        ({"problems": 24.0}, r"problems must be an integer of at least 1, not 24\.0"),
        ({"rank": 1000}, "rank"),
        ({"rank": 1, "directions": 15}, "R has 14 entries, too few for 15 directions; raise rank=1"),
    ],
)
def test_what_cannot_be_done_is_said_before_the_model_runs(calibrate, model, options, message):
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match=message):
        calibrate(**options)
    assert adapter_of(model) is None


def test_a_reward_that_never_differs_teaches_no_direction(model, tokenizer, task):
    silent = tl.Task("silent", task.train, task.validation, task.test, lambda completion, gold: 1.0)
    with pytest.raises(ValueError, match="only 0 of 24 problems"):
        tl.calibrate(model, tokenizer, silent, **OPTIONS)


@pytest.mark.parametrize("name", ["temperature", "learning_rate", "kl", "steps", "grup_size"])
def test_a_setting_that_calibration_does_not_have_is_refused(calibrate, name):
    with pytest.raises(TypeError, match=f"unexpected keyword argument: {name}"):
        calibrate(**{name: 1})


def test_micro_batches_change_nothing(calibrate):
    torch.testing.assert_close(calibrate(micro_batch=3).directions, calibrate().directions, atol=1e-4, rtol=0)


def test_another_sampler_answers_and_is_kept_in_step(calibrate, model, tokenizer):
    class Counting(ModelSampler):
        synced: ClassVar[list] = []

        def sync(self, adapter):
            self.synced.append(adapter.vectors.detach().clone())

    directions = calibrate(sampler=Counting(model, tokenizer)).directions
    assert torch.equal(directions, calibrate().directions)
    assert any(vectors.any() for vectors in Counting.synced)  # the line search moves R
    assert not Counting.synced[0].any()
