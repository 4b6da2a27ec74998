"""Log-probabilities in chunks are those of all logits at once, gradients included, and take less memory."""

import pytest
import torch

import tinylora_lite as tl
from tinylora_lite.sampling import policy
from tinylora_lite.sampling.logprobs import completion_logprobs
from tinylora_lite.sampling.rollouts import encode_prompts
from tinylora_lite.sampling.sampler import sample


@pytest.fixture
def rollouts(model, tokenizer, task):
    ids, mask = encode_prompts(tokenizer, task, task.train[:3])
    ids, mask = (tensor.repeat_interleave(2, dim=0) for tensor in (ids, mask))
    return sample(model, tokenizer, ids, mask, max_new_tokens=9)


def logprobs_and_gradient(model, adapter, rollouts):
    logprobs = completion_logprobs(model, rollouts, 0.7)
    weights = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(0)) * rollouts.completion_mask
    (gradient,) = torch.autograd.grad((logprobs * weights).sum(), adapter.vectors)
    return logprobs.detach(), gradient


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("tokens", [1, 5, 7])
def test_chunks_change_rounding_only(model, tokenizer, rollouts, monkeypatch, tokens, recompute):
    adapter = tl.attach(model, tl.TinyLoraConfig(rank=2, u=2))
    with torch.no_grad():
        adapter.vectors.normal_(generator=torch.Generator().manual_seed(1))
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    whole = logprobs_and_gradient(model, adapter, rollouts)
    rows = []
    head = model.get_output_embeddings()
    plain = head.forward
    monkeypatch.setattr(head, "forward", lambda hidden: rows.append(hidden.shape[:-1].numel()) or plain(hidden))
    monkeypatch.setattr(policy, "LOGITS_AT_ONCE", tokens * model.config.vocab_size)
    chunked = logprobs_and_gradient(model, adapter, rollouts)
    chunks = rows if recompute else rows[1:]  # the prompts' last tokens, one each, come first
    assert max(chunks) == tokens
    for one, other in zip(whole, chunked, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


def test_the_head_is_as_before(model, rollouts, monkeypatch):
    monkeypatch.setattr(policy, "LOGITS_AT_ONCE", model.config.vocab_size)
    completion_logprobs(model, rollouts)
    assert "forward" not in model.get_output_embeddings().__dict__

    def forward(hidden):
        raise RuntimeError("stop")

    head = model.get_output_embeddings()
    head.forward = forward
    with pytest.raises(RuntimeError, match="stop"):
        completion_logprobs(model, rollouts)
    assert head.forward is forward


def test_a_head_with_an_adapter_is_left_alone(model, rollouts, monkeypatch):
    monkeypatch.setattr(policy, "LOGITS_AT_ONCE", model.config.vocab_size)
    adapter = tl.attach(model, tl.TinyLoraConfig(rank=2, target_modules=["lm_head", "q_proj"]))
    with torch.no_grad():
        adapter.vectors.fill_(0.5)
    assert policy.tokens_at_once(model) is None
    adapted = completion_logprobs(model, rollouts).detach()
    adapter.detach()
    assert not torch.allclose(adapted, completion_logprobs(model, rollouts), atol=1e-3)


def test_no_more_logits_than_allowed_are_kept(make_model, tokenizer, task, monkeypatch):
    """What autograd keeps for the backward pass holds no tensor of all the logits."""
    model = make_model()
    tl.attach(model, tl.TinyLoraConfig(rank=2))
    ids, mask = encode_prompts(tokenizer, task, task.train[:2])
    rollouts = sample(model, tokenizer, ids, mask, max_new_tokens=12)

    weight = model.get_output_embeddings().weight.data_ptr()
    sizes = []

    def keep(tensor):
        if tensor.shape[-1] == vocabulary and tensor.data_ptr() != weight:
            sizes.append(tensor.numel())
        return tensor

    def largest() -> int:
        sizes.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            completion_logprobs(model, rollouts)
        return max(sizes)

    vocabulary = model.config.vocab_size
    whole = largest()
    monkeypatch.setattr(policy, "LOGITS_AT_ONCE", 3 * vocabulary)
    assert whole >= 2 * 11 * vocabulary
    assert largest() <= 3 * vocabulary
