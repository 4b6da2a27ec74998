"""A GGUF LoRA is the adapter: by the numbers in the file, in the order of rows that a GGUF base has."""

import json

import numpy as np
import pytest
import torch

import tinylora_lite as tl
from tinylora_lite.cli import main
from tinylora_lite.experiment.models import checkpoint, load_model

gguf = pytest.importorskip("gguf")


def adapted(model, config=None):
    adapter = tl.attach(model, config or tl.TinyLoraConfig(u=3, n_tie=4))
    with torch.no_grad():
        adapter.vectors.copy_(0.3 * torch.randn(adapter.vectors.shape, generator=torch.Generator().manual_seed(7)))
    return adapter


def restored(rows, heads):
    """Rows as transformers has them: ``_reverse_permute_weights`` of its reader of GGUF files."""
    return rows.reshape(heads, rows.shape[0] // heads // 2, 2, -1).swapaxes(2, 1).reshape(rows.shape)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_its_product_is_the_update(make_model, tmp_path, architecture, dtype):
    model = make_model(architecture)
    adapter = adapted(model, tl.TinyLoraConfig(rank=3, u=3, n_tie=4, sigma="split"))
    reader = gguf.GGUFReader(tl.export_gguf(adapter, tmp_path / "lora", dtype) / "adapter.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    expected = {"general.architecture": architecture, "general.type": "adapter", "adapter.type": "lora"}
    assert expected.items() <= fields.items()
    assert fields["adapter.lora.alpha"] == 3.0
    stored = {tensor.name: np.asarray(tensor.data) for tensor in reader.tensors}
    assert len(stored) == 2 * len(adapter.names)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.upper()), 2)
    heads = {"q_proj": 4, "k_proj": 2} if architecture == "llama" else {}
    for module in adapter.names:
        a, b = (stored[f"{names.get_name(module)}.weight.lora_{letter}"].astype(np.float64) for letter in "ab")
        assert (a.shape[0], b.shape[1]) == (3, 3)
        b = restored(b, count) if (count := heads.get(module.rpartition(".")[2])) else b
        wanted = adapter.delta(module).double().numpy()
        limit = {"fp32": 1e-6, "fp16": 2e-3}[dtype]
        assert np.linalg.norm(b @ a - wanted) < limit * np.linalg.norm(wanted)


def test_the_modelfile(make_model, tmp_path):
    model = make_model()
    folder = tl.export_gguf(adapted(model), tmp_path / "lora", base="/models/tiny.gguf")
    lines = ["FROM /models/tiny.gguf", "ADAPTER ./adapter.gguf", "PARAMETER temperature 0"]
    assert (folder / "Modelfile").read_text().splitlines() == lines
    first = (folder / "adapter.gguf").read_bytes()
    assert (tl.export_gguf(adapted(make_model()), folder) / "adapter.gguf").read_bytes() == first, "it is replaced"


def test_what_it_refuses(make_model, tmp_path):
    model = make_model()
    adapter = adapted(model)
    with pytest.raises(ValueError, match="dtype must be fp32 or fp16, not 'bf16'"):
        tl.export_gguf(adapter, tmp_path / "lora", "bf16")
    model.config.model_type = "phi"
    with pytest.raises(ValueError, match="a GGUF LoRA is for llama, mistral, qwen2, qwen3, not for phi"):
        tl.export_gguf(adapter, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
    (tmp_path / "notes").write_text("notes")
    for taken in (tmp_path, tmp_path / "notes"):
        with pytest.raises(FileExistsError, match="exists and is no GGUF LoRA that may be replaced"):
            tl.export_gguf(adapter, taken)


@pytest.mark.parametrize("tied", [True, False])
def test_an_output_layer(make_model, tmp_path, tied):
    model = make_model(tie_word_embeddings=tied)
    adapter = adapted(model, tl.TinyLoraConfig(target_modules=["lm_head", "v_proj"]))
    if tied:
        with pytest.raises(ValueError, match=r"llama.cpp has no place for lm_head; leave it out of target_modules"):
            tl.export_gguf(adapter, tmp_path / "lora")
    else:
        reader = gguf.GGUFReader(tl.export_gguf(adapter, tmp_path / "lora") / "adapter.gguf")
        assert "output.weight.lora_a" in {tensor.name for tensor in reader.tensors}


def test_by_the_command_line(write_gguf, tmp_path, monkeypatch, capsys):
    file = tmp_path / "tiny.gguf"
    write_gguf(file)
    model = load_model(str(file), dtype="float32", device="cpu")
    adapter = adapted(model)
    path, out = tl.save(adapter, tmp_path / "a.tinylora", "fp32"), tmp_path / "out"
    words = ["export", str(path), "--base", str(file), "--to", "gguf-lora", "--out", str(out)]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["serve"] == f"llama-server -m {file} --lora {out / 'adapter.gguf'}"
    assert set(found["files"]) == {"adapter.gguf", "Modelfile"}
    written = tl.export_gguf(adapter, tmp_path / "library") / "adapter.gguf"
    assert (out / "adapter.gguf").read_bytes() == written.read_bytes()
    assert (out / "Modelfile").read_text().splitlines()[0] == f"FROM {file}"
    monkeypatch.setenv("TINYLORA_CACHE", str(tmp_path / "cache"))
    assert main([*words[:-3], "lora", "--out", str(tmp_path / "peft"), "--json"]) == 0
    assert str(checkpoint(str(file))) in json.loads(capsys.readouterr().out)["serve"]
    monkeypatch.setenv("TINYLORA_CACHE", "off")
    assert main([*words[:-3], "lora", "--out", str(tmp_path / "peft"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["serve"] is None, "its base is gone when the command ends"
    (out / "mine").write_text("notes")
    assert main(words) == 1
    assert "is no GGUF LoRA that may be replaced" in capsys.readouterr().err
