"""Models by name: the shipped one, a folder's, and errors that say what to do."""

import copy

import pytest
import torch

from tinylora_lite.experiment.models import default_device, load_model


def test_the_nano_base():
    model, tokenizer = load_model("nano", dtype="float32")
    assert (model.dtype, model.device, model.training) == (torch.float32, default_device(), False)
    assert tokenizer.pad_token_id is not None
    assert load_model("nano")[0].dtype == torch.bfloat16


def test_a_folder(make_model, tokenizer, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    found, its_tokenizer = load_model(str(tmp_path), dtype="float32", device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), found.parameters(), strict=True))
    text = "ann has 3 and then ?"
    assert its_tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_a_tokenizer_without_a_pad_token_gets_one(make_model, tokenizer, tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    bare = copy.deepcopy(tokenizer)  # the fixture is everybody's
    bare.pad_token = None
    bare.save_pretrained(tmp_path)
    _, found = load_model(str(tmp_path), dtype="float32")
    assert found.pad_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nano", {"dtype": "int7"}, "dtype must be auto, bfloat16, float16 or float32, not 'int7'"),
        ("nano", {"quantize": "nf4"}, "small enough without quantize"),
    ],
)
def test_what_cannot_be(name, options, message):
    with pytest.raises(ValueError, match=message):
        load_model(name, **options)


def test_an_empty_folder(tmp_path):
    with pytest.raises(OSError, match=r"holds no config.json; give the folder of a transformers checkpoint"):
        load_model(str(tmp_path))


def test_a_name_that_nobody_knows(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        OSError, match=r"no model nobody/has-this: it is no folder here.*or give the folder of a checkpoint"
    ):
        load_model("nobody/has-this")
