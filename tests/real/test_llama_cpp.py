"""A real llama.cpp on SmolLM2, with and without an exported adapter: the same tokens, and logits within its arithmetic.

`make test-llama-cpp` builds llama.cpp and runs these tests with the Python that has it in ``LLAMA_CPP_PYTHON``.
"""

import json
import os
import random
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import tinylora_lite as tl
from tinylora_lite.experiment.models import load_tokenizer

gguf = pytest.importorskip("gguf")
pytestmark = [
    pytest.mark.llama_cpp,
    pytest.mark.skipif("LLAMA_CPP_PYTHON" not in os.environ, reason="needs llama.cpp: run `make test-llama-cpp`"),
]

QUESTION = "Ann has 3 apples and buys 14 more. How many apples has she?"
PIECES = [
    "Ann",
    " it",
    "an",
    "'s",
    "'S",
    "I'm",
    "é",
    "ß",
    "文",
    "😀",
    "½",
    "٣",
    "İ",
    "\u200b",
    "\u00a0",
    "_",
    "$",
    "####",
]
PIECES += [" ", "  ", "\n", "\n\n", "\t", "\r\n", "1", "23", "456", ".", "!?", "-", "<|im_end|>", "<repo_name>"]


def unpacked(file, out):
    """The same GGUF with every tensor in float32, as this library dequantizes it."""
    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith(("GGUF.", "general.")):
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1] if field.types[1:] else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def computed(folder, runs, texts=()):
    """llama.cpp's answer to a request; see ``run_llama_cpp.py``."""
    (folder / "request.json").write_text(json.dumps({"runs": runs, "texts": texts}), encoding="utf-8")
    script = Path(__file__).with_name("run_llama_cpp.py")
    command = [os.environ["LLAMA_CPP_PYTHON"], str(script), folder / "request.json", folder / "answer.npz"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(np.load(folder / "answer.npz"))


@pytest.fixture(scope="module")
def compared(file, smollm2, smollm2_tokenizer, tmp_path_factory):
    """Ours and theirs: of "base" and "adapter" token ids and logits, in float32 and as the file has them; and texts."""
    folder = tmp_path_factory.mktemp("llama_cpp")
    messages = [{"role": "user", "content": QUESTION}]
    prompt = smollm2_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    adapter = tl.attach(smollm2, tl.TinyLoraConfig(rank=2, u=1, n_tie=17))
    with torch.no_grad():
        adapter.vectors.copy_(0.3 * torch.randn(adapter.vectors.shape, generator=torch.Generator().manual_seed(1)))
    lora = str(tl.export_gguf(adapter, folder / "lora") / "adapter.gguf")
    ours, runs = {}, []
    for name in ("base", "adapter"):
        adapter.enabled = name == "adapter"
        ids = smollm2.generate(torch.tensor([prompt]), max_new_tokens=32, do_sample=False)[0]
        with torch.no_grad():
            ours[name] = ids[len(prompt) :].numpy(), smollm2(ids[None]).logits[0].numpy()
        for model in (unpacked(file, folder / "float32.gguf"), file):
            runs.append({"model": str(model), "lora": lora if adapter.enabled else None, "ids": ids.tolist()})
            runs[-1]["prompt"] = len(prompt)
    adapter.detach()
    draw = random.Random(0)
    texts = ["".join(draw.choices(PIECES, k=draw.randint(1, 14))) for _ in range(500)]
    return ours, computed(folder, runs, texts), texts


def apart(theirs, ours):
    return float(np.linalg.norm(theirs - ours) / np.linalg.norm(ours))


@pytest.mark.parametrize(("place", "name"), [(0, "base"), (2, "adapter")])
def test_in_float32(compared, place, name):
    """Both compute in float32, in other orders of summation."""
    ours, theirs, _ = compared
    tokens, logits = ours[name]
    assert theirs[f"greedy.{place}"].tolist() == tokens.tolist()
    print(f"{name}, float32: logits differ by {apart(theirs[f'logits.{place}'], logits):.1e} of their norm")
    assert apart(theirs[f"logits.{place}"], logits) < 1e-4
    assert apart(ours["adapter"][1][:16], ours["base"][1][:16]) > 0.05


def test_as_the_file_has_them(compared):
    """llama.cpp rounds activations to 8 bits, in blocks of 32, before it multiplies them by 4-bit weights.

    What that does to the base alone is the measure: the adapter is computed in float32 and may not add to it much.
    """
    ours, theirs, _ = compared
    errors = {}
    for place, name in ((1, "base"), (3, "adapter")):
        found, logits = theirs[f"logits.{place}"], ours[name][1]
        same, errors[name] = (found.argmax(1) == logits.argmax(1)).mean(), apart(found, logits)
        print(f"{name}, Q4_1: logits differ by {errors[name]:.1e} of their norm, {same:.1%} of likeliest tokens agree")
        assert same > 0.9
    assert errors["base"] < 0.1
    assert errors["adapter"] < 2 * errors["base"]


def test_texts_have_the_same_tokens(compared, smollm2_tokenizer):
    _, theirs, texts = compared
    ours = [smollm2_tokenizer(text)["input_ids"] for text in texts]
    assert ours == [theirs[f"tokens.{index}"].tolist() for index in range(len(texts))]
    assert [smollm2_tokenizer.decode(ids) for ids in ours] == texts


@pytest.mark.parametrize(
    ("architecture", "written"), [("llama", {}), ("qwen2", {}), ("llama", {"split": "llama-bpe", "scaled": 32.0})]
)
def test_tiny_models_of_each_architecture(write_gguf, tmp_path, architecture, written):
    model = write_gguf(tmp_path / "tiny.gguf", architecture, "F32", **written)
    adapter = tl.attach(model, tl.TinyLoraConfig(rank=3, u=3, n_tie=4))
    with torch.no_grad():
        adapter.vectors.copy_(torch.randn(adapter.vectors.shape, generator=torch.Generator().manual_seed(1)))
    lora = str(tl.export_gguf(adapter, tmp_path / "lora") / "adapter.gguf")
    ids = torch.arange(4, 52)
    run = {"model": str(tmp_path / "tiny.gguf"), "ids": ids.tolist(), "prompt": len(ids)}
    draw, tokenizer = random.Random(0), load_tokenizer(str(tmp_path / "tiny.gguf"))
    texts = ["".join(draw.choices(PIECES, k=draw.randint(1, 14))) for _ in range(100)]
    theirs = computed(tmp_path, [run | {"lora": None}, run | {"lora": lora}], texts)
    assert [tokenizer(text)["input_ids"] for text in texts] == [
        theirs[f"tokens.{index}"].tolist() for index in range(len(texts))
    ]
    with torch.no_grad():
        adapted = model(ids[None]).logits[0].numpy()
        adapter.enabled = False
        base = model(ids[None]).logits[0].numpy()
    assert apart(adapted, base) > 0.1
    assert apart(theirs["logits.0"], base) < 1e-5
    assert apart(theirs["logits.1"], adapted) < 1e-5
