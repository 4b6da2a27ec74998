"""The library on a real language model: SmolLM2-135M-Instruct, a Llama of 30 layers, read from its GGUF file."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

import tinylora_lite as tl
from tinylora_lite import nano
from tinylora_lite.adapter.weights import base_fingerprint
from tinylora_lite.files.file_format import DTYPES
from tinylora_lite.sampling.rollouts import encode_prompts
from tinylora_lite.sampling.sampler import ModelSampler, sample
from tinylora_lite.utils.record import base_gguf

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.real

GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FINGERPRINT = "a7249de7b505f364eca17e3b3c29367c9dd4d9c5f83e13663ace760991c501bf"
TEXT = "Ann has 3 apples.\n\n1. She buys  14 more, so she has 3 + 14 = 17 apples. The capital of France is Paris."


def logits(model, tokenizer):
    with torch.no_grad():
        return model(torch.tensor([tokenizer(TEXT)["input_ids"]])).logits[0].double()


def apart(a, b):
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


def restored(rows, heads):
    """Rows of queries and keys as transformers has them."""
    return rows.reshape(heads, rows.shape[0] // heads // 2, 2, -1).swapaxes(2, 1).reshape(rows.shape)


def test_its_weights_are_the_file_s(file, smollm2):
    assert (base_gguf(smollm2), base_fingerprint(smollm2)) == (GGUF_SHA256, FINGERPRINT)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 30)
    parameters = dict(smollm2.named_parameters())
    assert len(parameters) == len(stored) == 272
    for name, parameter in parameters.items():
        tensor = stored[names.get_name(name, (".weight",))]
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        heads = {"q_proj": 9, "k_proj": 3}.get(name.split(".")[-2])
        assert torch.equal(parameter, torch.from_numpy(restored(values, heads) if heads else values.copy())), name


def test_its_tokenizer_is_the_file_s(file, smollm2, smollm2_tokenizer):
    tokens = gguf.GGUFReader(file).fields["tokenizer.ggml.tokens"].contents()
    assert smollm2_tokenizer.convert_ids_to_tokens(list(range(len(tokens)))) == tokens
    ids = smollm2_tokenizer(TEXT)["input_ids"]
    pieces = "Ann Ġhas Ġ 3 Ġapples . ĊĊ 1 . ĠShe Ġbuys ĠĠ 1"
    assert smollm2_tokenizer.decode(ids) == TEXT
    assert smollm2_tokenizer.convert_ids_to_tokens(ids)[:13] == pieces.split()
    assert (smollm2_tokenizer.eos_token, smollm2_tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")


def test_the_rule_against_dense_float64(smollm2, smollm2_tokenizer, adapter):
    """``W' = W + U Σ R Vᵀ`` with LAPACK's factors of the first block, and the logits of dense weights in all blocks."""
    for name in adapter.names[:7]:
        factors, W = adapter.factors(name), smollm2.get_submodule(name).weight.double()
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        signs = (Vh[:2] * factors.right.double()).sum(dim=1).sign()
        R = signs[:, None] * adapter.mixing(name).double() * signs
        assert apart(adapter.delta(name), U[:, :2] * S[:2] @ R @ Vh[:2]) < 1e-4
    ours = logits(smollm2, smollm2_tokenizer)
    deltas = {name: adapter.delta(name).double() for name in adapter.names}
    with adapter.disabled():
        untouched = logits(smollm2, smollm2_tokenizer)
    adapter.detach()
    dense = copy.deepcopy(smollm2).double()
    for name, delta in deltas.items():
        dense.get_submodule(name).weight.data += delta
    assert apart(ours, untouched) > 0.05
    assert apart(ours, logits(dense, smollm2_tokenizer)) < 1e-5


@pytest.mark.parametrize(("precision", "dtype"), DTYPES.items())
def test_its_file_in_every_precision(smollm2, smollm2_tokenizer, adapter, tmp_path, precision, dtype):
    wanted = adapter.vectors.detach().to(dtype).float()
    path = tl.save(adapter, tmp_path / "a.tinylora", precision)
    with torch.no_grad():
        adapter.vectors.copy_(wanted)
    expected = logits(smollm2, smollm2_tokenizer)
    adapter.detach()
    found = tl.load(smollm2, path)
    assert torch.equal(found.vectors, wanted)
    assert torch.equal(logits(smollm2, smollm2_tokenizer), expected)
    found.detach()


def test_peft_computes_the_same(smollm2, smollm2_tokenizer, adapter, tmp_path):
    peft = pytest.importorskip("peft")
    tl.export_lora(adapter, tmp_path / "lora")
    ours = logits(smollm2, smollm2_tokenizer)
    adapter.detach()
    served = peft.PeftModel.from_pretrained(copy.deepcopy(smollm2), tmp_path / "lora").eval()
    assert apart(logits(served, smollm2_tokenizer), ours) < 1e-5


def test_the_gguf_lora_is_the_update(adapter, tmp_path):
    reader = gguf.GGUFReader(tl.export_gguf(adapter, tmp_path / "lora") / "adapter.gguf")
    stored = {tensor.name: np.asarray(tensor.data, np.float64) for tensor in reader.tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 30)
    for module in adapter.names:
        a, b = (stored[f"{names.get_name(module)}.weight.lora_{letter}"] for letter in "ab")
        heads = {"q_proj": 9, "k_proj": 3}.get(module.rpartition(".")[2])
        product = (restored(b, heads) if heads else b) @ a
        assert apart(torch.from_numpy(product), adapter.delta(module)) < 1e-6, module
    assert len(stored) == 2 * len(adapter.names) == 420


@pytest.mark.usefixtures("adapter")
def test_padded_sampling_reports_the_probabilities_of_unpadded_prompts(smollm2, smollm2_tokenizer):
    prompts = ["Hi.", "Ann has 3 apples and buys 14 more. How many apples has she?", "Name a river.", "2+2?"]
    problems = [tl.Example(prompt, "") for prompt in prompts]
    task = tl.Task("questions", problems, problems, problems, lambda text, gold: 0.0)
    drawn = sample(smollm2, smollm2_tokenizer, *encode_prompts(smollm2_tokenizer, task, problems), max_new_tokens=24)
    for row in range(len(prompts)):
        prompt = drawn.prompt_ids[row][drawn.prompt_mask[row].bool()]
        tokens, length = drawn.completion_ids[row][drawn.completion_mask[row].bool()], len(prompt)
        with torch.no_grad():
            found = smollm2(torch.cat([prompt, tokens])[None]).logits[0, length - 1 : -1].log_softmax(-1)
        alone = found.gather(1, tokens[:, None])[:, 0]
        assert (alone - drawn.logprobs[row, : len(tokens)]).abs().max() < 1e-4


def test_two_steps_of_grpo_are_trls(smollm2, smollm2_tokenizer):
    """The same samples, under TRL's trainer with the optimizer over a LoRA and in our loop."""
    pytest.importorskip("trl")
    from tinylora_lite.engines.trl import train_trl

    task = replace(nano.word_problems(1), reward=lambda text, gold: float(len(text) % 2))
    settings = tl.GRPOSettings(
        steps=2, prompts_per_step=2, group_size=4, max_new_tokens=24, learning_rate=0.02, truncated="score"
    )
    trained, runs = [], []
    for train in (tl.train_grpo, train_trl):
        adapter = tl.attach(smollm2, tl.TinyLoraConfig(rank=2, u=1, n_tie=17))
        sampler = ModelSampler(smollm2, smollm2_tokenizer)
        runs.append(train(smollm2, smollm2_tokenizer, adapter, task, settings, sampler=sampler))
        adapter.detach()
        trained.append(adapter.vectors.detach())
    ours, theirs = runs
    assert theirs.curve("reward") == pytest.approx(ours.curve("reward"))
    assert theirs.curve("gradient_norm") == pytest.approx(ours.curve("gradient_norm"), rel=1e-3)
    assert trained[0].abs().min() > 0.001
    assert torch.allclose(*trained, atol=2e-5)
