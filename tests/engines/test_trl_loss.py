"""Our loss is TRL's on the same batch, in float64 to 1e-6; ten times finer than anything training would notice."""

from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from tinylora_lite.training.losses import grpo_advantages, grpo_loss

pytest.importorskip("trl")

from trl import GRPOTrainer

from tinylora_lite.engines.trl_config import LOSSES

LIMIT, GROUP = 12, 3
LENGTHS = torch.tensor([9, 1, 4, 9, 7, 2])
TRUNCATED = torch.tensor([True, False, False, True, False, False])


def theirs(batch: dict, loss_type: str, low: float, high: float, beta: float, cap: float | None) -> torch.Tensor:
    """TRL's own loss of a batch whose log-probabilities are given."""
    stub = MagicMock(
        loss_type=loss_type,
        beta=beta,
        epsilon_low=low,
        epsilon_high=high,
        use_vllm=cap is not None,
        vllm_importance_sampling_correction=cap is not None,
        max_completion_length=LIMIT,
        importance_sampling_level="token",
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        aux_loss_enabled=False,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
    )
    stub._get_per_token_logps_and_entropies.return_value = (batch["new"], torch.zeros_like(batch["old"]), None)
    rows, tokens = batch["old"].shape
    inputs = {
        "prompt_ids": torch.zeros(rows, 1, dtype=torch.long),
        "prompt_mask": torch.ones(rows, 1, dtype=torch.long),
        "completion_ids": torch.zeros(rows, tokens, dtype=torch.long),
        "completion_mask": batch["mask"],
        "advantages": batch["advantages"],
        "old_per_token_logps": batch["old"],
        "ref_per_token_logps": batch["ref"],
        "num_items_in_batch": batch["mask"].sum(),
    }
    if cap is not None:
        inputs["importance_sampling_ratio"] = torch.exp(batch["old"] - batch["sampler"]).clamp(max=cap)
    return GRPOTrainer._compute_loss(stub, None, inputs)


@pytest.mark.parametrize(("scale", "masked"), [("group", False), ("batch", True), ("none", True)])
@pytest.mark.parametrize("cap", [None, 2.0, 1.1], ids=["no correction", "cap 2", "cap 1.1"])
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.2, 0.28), (0.05, 0.4)])
@pytest.mark.parametrize("normalise", LOSSES)
def test_loss_and_gradient_are_those_of_trl(normalise, low, high, beta, cap, scale, masked):
    noise = torch.Generator().manual_seed(0)
    shape = (len(LENGTHS), int(LENGTHS.max()))

    def near(values: torch.Tensor, far: float) -> torch.Tensor:
        return values + far * torch.randn(shape, generator=noise, dtype=torch.float64)

    old = -3 * torch.rand(shape, generator=noise, dtype=torch.float64)
    mask = (torch.arange(shape[1]) < LENGTHS[:, None]).long()
    rewards = torch.rand(len(LENGTHS) // GROUP, GROUP, generator=noise)
    batch = {
        "new": near(old, 0.4).requires_grad_(),
        "old": old,
        "ref": near(old, 0.3),
        "sampler": near(old, 0.5),
        # A masked row counts among the completions, and its tokens do not count.
        "mask": mask * ~TRUNCATED[:, None] if masked else mask,
        "advantages": grpo_advantages(rewards, scale).flatten().double(),
    }
    expected = theirs(batch, LOSSES[normalise], low, high, beta, cap)
    found = grpo_loss(
        batch["new"],
        batch["old"],
        batch["advantages"],
        batch["mask"],
        clip_low=low,
        clip_high=high,
        normalise=normalise,
        max_tokens=LIMIT,
        sampler_logprobs=None if cap is None else batch["sampler"],
        tis_cap=cap or 1.0,
        ref_logprobs=batch["ref"],
        kl=beta,
    )
    assert abs(found.item() - expected.item()) < 1e-6
    gradients = [torch.autograd.grad(loss, batch["new"], retain_graph=True)[0] for loss in (found, expected)]
    assert gradients[0].abs().max() > 1e-3
    assert torch.allclose(*gradients, rtol=0, atol=1e-6)
