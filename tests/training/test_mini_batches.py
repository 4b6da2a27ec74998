"""Several updates from the samples of a step, each from its share of the prompts, and weight decay."""

import dataclasses

import pytest
import torch

import tinylora_lite as tl
from tinylora_lite.sampling.logprobs import completion_logprobs
from tinylora_lite.training.grpo import GRPO
from tinylora_lite.training.loop import update

SETTINGS = tl.GRPOSettings(
    steps=1,
    prompts_per_step=4,
    group_size=4,
    mini_batches=2,
    max_new_tokens=3,
    clip_low=0.2,
    clip_high=0.4,
    learning_rate=0.3,
    weight_decay=0.1,
    max_grad_norm=1e9,
    truncated="score",
    micro_batch=3,
)


def test_two_updates_from_a_batch_by_hand(model, tokenizer, numbers):
    """The second is of the other prompts, clipped against the policy before the first; the weights decay in both."""
    adapter = tl.attach(model, tl.TinyLoraConfig(u=3, n_tie=4, init_std=0.05))
    objective = GRPO(model, tokenizer, adapter, numbers, [SETTINGS])
    batch, start = objective.batch(0), adapter.vectors.detach().clone()
    assert batch.mini_batch.tolist() == [0] * 4 + [1] * 4 + [0] * 4 + [1] * 4
    groups = [{"params": [adapter.vectors], "weight_decay": 0.1}]
    (row,) = update(objective, torch.optim.AdamW(groups, lr=0.3), batch)
    found = adapter.vectors.detach().clone()

    adapter.vectors.data.copy_(start)
    optimizer = torch.optim.AdamW(groups, lr=0.3)
    old = completion_logprobs(model, batch.rollouts).detach()
    clipped, losses = 0.0, []
    for of_prompts in ([0, 2], [1, 3]):
        rows = torch.tensor([4 * prompt + k for prompt in of_prompts for k in range(4)])
        logprobs = completion_logprobs(model, batch.rollouts)[rows]
        mask, A = batch.rollouts.completion_mask[rows].bool(), batch.advantages[rows]
        options = {"clip_low": 0.2, "clip_high": 0.4, "sampler_logprobs": batch.rollouts.logprobs[rows]}
        loss = tl.grpo_loss(logprobs, old[rows], A, mask, **options)
        ratio = torch.exp(logprobs - old[rows])
        clipped += (mask & (((ratio < 0.8) & (A[:, None] < 0)) | ((ratio > 1.4) & (A[:, None] > 0)))).sum().item()
        losses.append((-(logprobs * mask).sum(dim=1) * A).sum().item() / mask.sum().item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(found, adapter.vectors.detach(), rtol=1e-4, atol=1e-5)
    assert row["clipped"] == pytest.approx(clipped / batch.tokens.item())
    assert row["loss"] == pytest.approx(sum(losses) / 2, rel=1e-4, abs=1e-6)
    assert row["clipped"] > 0, "the test is about clipping in the second update"


@pytest.mark.parametrize("normalise", ["token", "sequence", "constant"])
def test_one_prompt_an_update_is_a_step_of_that_prompt(model, tokenizer, numbers, normalise):
    """The first update of four is the update of a batch that holds its prompt alone."""
    vectors = []
    for M in (4, 1):
        settings = dataclasses.replace(SETTINGS, mini_batches=M, normalise=normalise, weight_decay=0.0)
        adapter = tl.attach(model, tl.TinyLoraConfig(u=3, n_tie=4))
        objective = GRPO(model, tokenizer, adapter, numbers, [settings])
        batch = objective.batch(0)
        # Plain gradient steps, so that their lengths count.
        if M == 4:
            update(
                objective,
                torch.optim.SGD(adapter.parameters(), lr=0.1),
                dataclasses.replace(batch, counted=batch.mini_batch == 0),
            )
        else:
            first = torch.arange(4)
            alone = objective.weighed(batch.rollouts.rows(first), batch.advantages[first])
            update(objective, torch.optim.SGD(adapter.parameters(), lr=0.1), alone)
        vectors.append(adapter.vectors.detach().clone())
        adapter.detach()
    assert vectors[0].abs().max() > 0
    torch.testing.assert_close(*vectors, rtol=1e-4, atol=1e-7)


def test_prompts_that_cannot_be_shared_are_refused():
    with pytest.raises(ValueError, match="prompts_per_step=6 and mini_batches=4: the prompts cannot be shared equally"):
        tl.GRPOSettings(prompts_per_step=6, mini_batches=4)
    with pytest.raises(ValueError, match="weight_decay must be a finite number of at least 0"):
        tl.GRPOSettings(weight_decay=-0.1)
