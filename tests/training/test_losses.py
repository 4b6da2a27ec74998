"""The formulas against numbers worked out by hand; tests/engines/test_trl_loss.py holds them against TRL."""

import doctest
import math

import pytest
import torch

from tinylora_lite.training import losses
from tinylora_lite.training.losses import grpo_advantages, grpo_loss

# Two completions of three tokens, the last one of the second padding. With clipping at 0.2 the per-token objectives
# min(ratio A, clip(ratio) A) are 2, 2.4 (clipped), 1 and -1.5, -0.8 (clipped).
OLD = torch.tensor([[-1.0, -2.0, -1.5], [-0.5, -1.0, -3.0]])
RATIO = torch.tensor([[1.0, 1.5, 0.5], [1.5, 0.5, 1.0]])
NEW = OLD + RATIO.log()
A = torch.tensor([2.0, -1.0])
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])


def loss(**options) -> float:
    return grpo_loss(NEW, OLD, A, MASK, **options).item()


def test_worked_examples_in_the_docstrings():
    assert doctest.testmod(losses) == (0, 4)


class TestAdvantages:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]])

    def test_group(self):
        # Means 1/4 and 1/2; standard deviations with Bessel's correction 1/2 and 1/sqrt(3) = 0.57735.
        expected = [[0.75 / 0.5, -0.5, -0.5, -0.5], [0.8660254, 0.8660254, -0.8660254, -0.8660254]]
        assert torch.allclose(grpo_advantages(self.rewards, "group", eps=0.0), torch.tensor(expected))

    def test_eps_is_added_to_the_deviation(self):
        assert grpo_advantages(self.rewards, "group", eps=0.5)[0, 0].item() == pytest.approx(0.75)

    def test_batch(self):
        # All eight: mean 3/8, variance (3 · 25/64 + 5 · 9/64) / 7 = 15/56.
        expected = 0.75 / math.sqrt(15 / 56)
        assert grpo_advantages(self.rewards, "batch", eps=0.0)[0, 0].item() == pytest.approx(expected)

    def test_none(self):
        expected = torch.tensor([[0.75, -0.25, -0.25, -0.25], [0.5, 0.5, -0.5, -0.5]])
        assert torch.equal(grpo_advantages(self.rewards, "none"), expected)

    @pytest.mark.parametrize("scale", ["group", "batch", "none"])
    def test_equal_rewards_say_exactly_nothing(self, scale):
        # In float32 the mean of seven times 0.1 is not 0.1.
        rewards = torch.tensor([[0.1] * 7, [0.0] * 6 + [1.0]])
        advantages = grpo_advantages(rewards, scale)
        assert torch.equal(advantages[0], torch.zeros(7))
        assert advantages[1].all()

    def test_integers_are_rewards(self):
        assert grpo_advantages(torch.tensor([[1, 0]]), "none").tolist() == [[0.5, -0.5]]

    @pytest.mark.parametrize("worth", [math.nan, math.inf, -math.inf])
    def test_a_reward_must_be_finite(self, worth):
        with pytest.raises(ValueError, match="must return finite numbers"):
            grpo_advantages(torch.tensor([[1.0, worth]]))

    @pytest.mark.parametrize("shape", [(4, 1), (4,), (2, 2, 2)])
    def test_groups_of_one_are_refused(self, shape):
        with pytest.raises(ValueError, match="group_size of at least 2"):
            grpo_advantages(torch.zeros(shape))

    def test_unknown_scale(self):
        with pytest.raises(ValueError, match="group, batch or none"):
            grpo_advantages(self.rewards, "std")


class TestLoss:
    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({"normalise": "token"}, (-(2 + 2.4 + 1) + (1.5 + 0.8)) / 5),
            ({"normalise": "sequence"}, (-(2 + 2.4 + 1) / 3 + (1.5 + 0.8) / 2) / 2),
            ({"normalise": "constant", "max_tokens": 4}, (-(2 + 2.4 + 1) + (1.5 + 0.8)) / 8),
            ({"denominator": 10.0}, (-(2 + 2.4 + 1) + (1.5 + 0.8)) / 10),
            ({"clip_high": 0.28}, (-(2 + 2.56 + 1) + (1.5 + 0.8)) / 5),
            ({"clip_low": 0.4}, (-(2 + 2.4 + 1) + (1.5 + 0.6)) / 5),
        ],
    )
    def test_by_hand(self, options, expected):
        assert loss(**options) == pytest.approx(expected, rel=1e-6)

    def test_kl_by_hand(self):
        # The reference finds every token twice as likely: k3 = 2 - log 2 - 1.
        found = loss(ref_logprobs=NEW + math.log(2), kl=0.1)
        assert found == pytest.approx(-0.62 + 0.1 * (1 - math.log(2)), rel=1e-6)

    def test_importance_weights_by_hand(self):
        # The trainer finds the first completion 4 times as likely as the sampler did (capped at 2), the second half.
        sampler = torch.stack([OLD[0] - math.log(4), OLD[1] + math.log(2)])
        assert loss(sampler_logprobs=sampler) == pytest.approx((-5.4 * 2 + 2.3 * 0.5) / 5, rel=1e-6)
        assert loss(sampler_logprobs=sampler, tis_cap=3.0) == pytest.approx((-5.4 * 3 + 2.3 * 0.5) / 5, rel=1e-6)

    def test_importance_weights_do_not_weigh_the_kl_penalty(self):
        options = {"sampler_logprobs": OLD - math.log(2), "ref_logprobs": NEW + math.log(2), "kl": 0.1}
        assert loss(**options) == pytest.approx(2 * -0.62 + 0.1 * (1 - math.log(2)), rel=1e-6)

    def test_gradient_by_hand_and_zero_where_clipped(self):
        new = NEW.clone().requires_grad_()
        grpo_loss(new, OLD, A, MASK).backward()
        expected = torch.tensor([[-0.4, 0.0, -0.2], [0.3, 0.0, 0.0]])  # -ratio · A / 5
        assert torch.allclose(new.grad, expected, atol=1e-7)

    def test_kl_gradient_by_hand(self):
        new = NEW.clone().requires_grad_()
        grpo_loss(new, OLD, torch.zeros(2), MASK, ref_logprobs=NEW + math.log(2), kl=0.1).backward()
        assert torch.allclose(new.grad, 0.1 * (1 - 2.0) * MASK / 5)  # d k3 / d logprob = 1 - exp(ref - logprob)

    def test_at_ratio_one_it_is_the_policy_gradient(self):
        new = OLD.clone().requires_grad_()
        grpo_loss(new, new, A, MASK).backward()  # the old log-probabilities are constants even if they are the new
        reinforce = OLD.clone().requires_grad_()
        (-(reinforce * A[:, None] * MASK).sum() / MASK.sum()).backward()
        assert torch.equal(new.grad, reinforce.grad)

    @pytest.mark.parametrize(("normalise", "denominator"), [("token", 5.0), ("sequence", 2.0), ("constant", 2.0 * 4)])
    def test_micro_batches_add_up(self, normalise, denominator):
        parts = [
            grpo_loss(
                NEW[i : i + 1],
                OLD[i : i + 1],
                A[i : i + 1],
                MASK[i : i + 1],
                normalise=normalise,
                max_tokens=4,
                denominator=denominator,
            )
            for i in range(2)
        ]
        assert sum(parts).item() == pytest.approx(loss(normalise=normalise, max_tokens=4), rel=1e-6)

    @pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf, 1e30])
    def test_padding_may_hold_anything(self, junk):
        def dirty(clean):
            return torch.where(MASK.bool(), clean, junk)

        new = dirty(NEW).requires_grad_()
        options = {"sampler_logprobs": dirty(OLD - 0.1), "ref_logprobs": dirty(OLD), "kl": 0.1}
        found = grpo_loss(new, dirty(OLD), A, MASK, **options)
        found.backward()
        assert found.item() == loss(sampler_logprobs=OLD - 0.1, ref_logprobs=OLD, kl=0.1)
        assert new.grad[1, 2] == 0
        assert torch.isfinite(new.grad).all()

    def test_nothing_but_padding_costs_nothing(self):
        for normalise in ("token", "sequence", "constant"):
            empty = grpo_loss(NEW, OLD, A, torch.zeros_like(MASK), normalise=normalise, max_tokens=4)
            assert empty.item() == 0

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"advantages": A[:, None]}, "flatten"),
            ({"mask": MASK[:, :2]}, r"mask is \(2, 2\), but logprobs is \(2, 3\)"),
            ({"old_logprobs": OLD[:1]}, "old_logprobs is"),
            ({"ref_logprobs": OLD[0]}, "ref_logprobs is"),
            ({"kl": 0.1}, "needs ref_logprobs"),
            ({"normalise": "constant"}, "needs max_tokens"),
            ({"normalise": "mean"}, "token, sequence or constant"),
        ],
    )
    def test_bad_arguments(self, change, message):
        arguments = {"logprobs": NEW, "old_logprobs": OLD, "advantages": A, "mask": MASK}
        with pytest.raises(ValueError, match=message):
            grpo_loss(**arguments | change)
