"""The kinds of singular directions, against dense float64."""

from dataclasses import replace

import pytest
import torch

from tinylora_lite.adapter.tying import find_target_modules
from tinylora_lite.lab import directions
from tinylora_lite.lab.directions import factors_along
from tinylora_lite.lab.trial import DIRECTIONS, Trial
from tinylora_lite.sampling.sampler import ModelSampler
from tinylora_lite.tasks.task import Task
from tinylora_lite.training.batches import draw_prompts, rollout, score
from tinylora_lite.training.losses import grpo_advantages
from tinylora_lite.training.settings import GRPOSettings

TRIAL = Trial(rank=2, u=1, n_tie=1)


@pytest.fixture(autouse=True)
def numbers(monkeypatch, task) -> Task:
    """Rewarded is the share of words that are numbers, of which every random model earns some."""
    settings = GRPOSettings(truncated="score")
    monkeypatch.setattr(directions, "GRPOSettings", lambda **own: replace(settings, **own))

    def reward(text: str, gold: str) -> float:
        words = text.split()
        return sum(word.isdigit() for word in words) / max(1, len(words))

    numbers = replace(task, reward=reward)
    monkeypatch.setattr(directions, "PROBLEMS", 6)
    monkeypatch.setattr(directions, "task_of", lambda name, base: numbers)
    monkeypatch.setattr(directions.nano, "MAX_NEW_TOKENS", 8)
    return numbers


def weights(model) -> dict[str, torch.Tensor]:
    modules = dict(model.named_modules())
    return {target.name: modules[target.name].weight.detach().double() for target in find_target_modules(model)}


@pytest.mark.parametrize(("kind", "first"), [("leading", 0), ("middle", 15), ("trailing", 30)])
def test_plain_kinds_are_rows_of_the_svd(model, tokenizer, kind, first):
    """Up to a sign for each, with the leading singular values beside them. The tiny model's ranks are 32 and 16."""
    found = factors_along(model, tokenizer, replace(TRIAL, directions=kind))
    for name, W in weights(model).items():
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        start = {"middle": (len(S) - 2) // 2, "trailing": len(S) - 2}.get(kind, 0)
        assert start == first or len(S) != 32
        overlap = (Vh[start : start + 2] @ found[name].right.double().T).abs()
        torch.testing.assert_close(overlap, torch.eye(2, dtype=torch.float64), atol=1e-3, rtol=0)
        overlap = (U[:, start : start + 2].T @ found[name].left.double()).abs()
        torch.testing.assert_close(overlap, torch.diag(S[:2]), atol=1e-2, rtol=0)


@pytest.mark.parametrize("sigma", ["left", "split", "right"])
@pytest.mark.parametrize("kind", DIRECTIONS)
def test_every_kind_has_directions_of_length_one_and_the_leading_values(model, tokenizer, kind, sigma):
    found = factors_along(model, tokenizer, replace(TRIAL, directions=kind, sigma=sigma))
    for name, W in weights(model).items():
        S = torch.linalg.svdvals(W)[:2]
        product = found[name].left.norm(dim=0) * found[name].right.norm(dim=1)
        torch.testing.assert_close(product.double(), S, rtol=1e-4, atol=1e-5)


def test_rotated_directions_are_orthonormal_and_depend_on_the_seed_of_p_alone(model, tokenizer):
    rotated = replace(TRIAL, directions="rotated")
    found, again, other = (
        factors_along(model, tokenizer, replace(rotated, seed=seed, projection_seed=p_seed))
        for seed, p_seed in ((0, None), (3, 0), (3, None))
    )
    for name, factors in found.items():
        torch.testing.assert_close(factors.right @ factors.right.T, torch.eye(2), atol=1e-5, rtol=0)
        assert torch.equal(factors.right, again[name].right)
        assert not torch.allclose(factors.right, other[name].right, atol=0.1)


def test_trials_that_draw_their_directions_share_a_batch_only_where_they_draw_the_same():
    leading, rotated = (replace(TRIAL, directions=kind) for kind in ("leading", "rotated"))
    assert leading.batch() == replace(leading, seed=1).batch()
    assert rotated.batch() != replace(rotated, seed=1).batch()
    assert rotated.batch() == replace(rotated, seed=1, projection_seed=0).batch()


def test_weighted_directions_hold_the_best_weighted_approximation():
    """Eckart and Young: in B^½ · A^½ no pair of subspaces of two dimensions leaves less than the tail of the values."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(10, 8, generator=generator)
    A, B = (x @ x.T for x in (torch.randn(8, 30, generator=generator), torch.randn(10, 30, generator=generator)))
    U, Vh = directions._weighted(W, A, B)
    root_A, root_B = (directions._roots(M)[0].double() for M in (A, B))
    left, right = root_B @ U[:, :2].double(), Vh[:2].double() @ root_A
    target = root_B @ W.double() @ root_A
    inside = left @ torch.linalg.pinv(left) @ target @ torch.linalg.pinv(right) @ right
    tail = torch.linalg.svdvals(target)[2:].square().sum()
    assert (target - inside).square().sum() == pytest.approx(tail.item(), rel=1e-4)
    plain_U, _, plain_V = torch.linalg.svd(W)
    same_U, same_V = directions._weighted(W, torch.eye(8), torch.eye(10))
    torch.testing.assert_close((same_U[:, :3].T @ plain_U[:, :3]).abs(), torch.eye(3), atol=1e-3, rtol=0)
    torch.testing.assert_close((same_V[:3] @ plain_V[:3].T).abs(), torch.eye(3), atol=1e-3, rtol=0)


def test_roots_are_roots_and_inverses():
    x = torch.randn(6, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    moment = x @ x.T
    root, inverse = directions._roots(moment.float())
    ridged = moment + directions.RIDGE * torch.linalg.eigvalsh(moment).mean() * torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close((root @ root).double(), ridged, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(root @ inverse, torch.eye(6), atol=1e-4, rtol=0)


def test_moments_are_those_of_a_plain_pass_over_the_same_answers(model, tokenizer, numbers):
    """One forward pass over prompt and answer in float64, with gradients of a loss written out here."""
    names = list(weights(model))
    found = directions._moments(model, tokenizer, TRIAL, names)
    settings = GRPOSettings(prompts_per_step=6, max_new_tokens=8, seed=0, truncated="score")
    examples = draw_prompts(numbers.train, settings, 0)
    rollouts = rollout(model, tokenizer, numbers, examples, settings, 0, ModelSampler(model, tokenizer))
    advantages = grpo_advantages(score(rollouts, numbers, examples, settings), "none").flatten().double()
    model = model.double()
    name = "model.layers.1.mlp.up_proj"
    A, B = torch.zeros(32, 32, dtype=torch.float64), torch.zeros(48, 48, dtype=torch.float64)
    kept = {}

    def keep(_, inputs, output):
        output.retain_grad()
        kept["x"], kept["y"] = inputs[0], output

    handle = model.get_submodule(name).register_forward_hook(keep)
    for row in range(len(rollouts)):
        prompt = rollouts.prompt_ids[row][rollouts.prompt_mask[row].bool()]
        answer = rollouts.completion_ids[row][rollouts.completion_mask[row].bool()]
        logits = model(torch.cat([prompt, answer])[None]).logits[0]
        inside = slice(len(prompt), len(prompt) + len(answer) - 1)
        before = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
        logprobs = logits[before].log_softmax(-1).gather(1, answer[:, None])
        (-(logprobs.sum() * advantages[row])).backward()
        x, g = kept["x"][0, inside].detach(), kept["y"].grad[0, inside]
        A, B = A + x.T @ x, B + g.T @ g
    handle.remove()
    torch.testing.assert_close(found[name][0].double(), A, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found[name][1].double(), B, rtol=1e-3, atol=1e-6)


def test_a_kind_that_is_not_known_is_named(model, tokenizer):
    with pytest.raises(ValueError, match=r"directions must be one of leading, .*, not 'sideways'"):
        factors_along(model, tokenizer, replace(TRIAL, directions="sideways"))


def test_rewards_that_are_all_alike_give_no_gradient_to_weigh_by(model, tokenizer, task, monkeypatch):
    monkeypatch.setattr(directions, "task_of", lambda name, base: replace(task, reward=lambda text, gold: 1.0))
    with pytest.raises(ValueError, match="all answers to a problem earned the same"):
        factors_along(model, tokenizer, replace(TRIAL, directions="Fisher"))
