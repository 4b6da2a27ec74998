"""Models by name: the shipped one, a folder's, and errors that say what to do."""

import copy

import pytest
import torch

from tinylora_lite import nano
from tinylora_lite.experiment.models import load_model, load_tokenizer


def test_the_nano_base():
    model, shipped = load_model("nano", dtype="float32"), nano.load()
    wanted = "cuda" if torch.cuda.is_available() else "cpu"
    assert (model.dtype, model.device.type, model.training) == (torch.float32, wanted, False)
    assert all(torch.equal(a, b) for a, b in zip(shipped[0].parameters(), model.parameters(), strict=True))
    text = nano.task().test[0].prompt
    assert load_tokenizer("nano")(text).input_ids == shipped[1](text).input_ids
    assert load_model("nano").dtype == torch.bfloat16
    assert load_model("nano", dtype="auto").dtype == torch.float32
    with pytest.raises(ValueError, match="the nano base is small enough without quantize; leave it out"):
        load_model("nano", quantize="nf4")


def test_a_folder(make_model, tokenizer, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    found = load_model(str(tmp_path), dtype="float32", device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), found.parameters(), strict=True))
    text = "ann has 3 and then ?"
    assert load_tokenizer(str(tmp_path))(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_a_tokenizer_without_a_pad_token_gets_one(make_model, tokenizer, tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    bare = copy.deepcopy(tokenizer)  # the fixture is everybody's
    bare.pad_token = None
    bare.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).pad_token_id == tokenizer.eos_token_id


def test_a_device_that_is_not_there():
    with pytest.raises(ValueError, match="there is no device cuda:77 here"):
        load_model("nano", device="cuda:77")


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_an_empty_folder(load, tmp_path):
    with pytest.raises(
        OSError, match=rf"^{tmp_path} holds no config.json; give the folder of a transformers checkpoint"
    ):
        load(str(tmp_path))


def test_a_damaged_checkpoint(make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"notes")
    with pytest.raises(OSError, match=rf"loaded from {tmp_path} \(.*deserializing"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_name_that_nobody_knows(load, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"HF_HUB_OFFLINE is set; unset it, run `hf download nobody/has-this`"):
        load("nobody/has-this")


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere", "runs/one/model"])
def test_a_path_that_leads_nowhere(name):
    with pytest.raises(OSError, match=f"no folder at {name}; give the folder"):
        load_tokenizer(name)
