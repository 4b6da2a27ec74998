"""export: what it writes computes, in PEFT and transformers alone, what the adapter computes here."""

import json
import shlex
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import tinylora_lite as tl
from tinylora_lite import nano
from tinylora_lite.adapter.tying import find_target_modules
from tinylora_lite.cli import main, shared

TOKENS = torch.arange(2, 26).reshape(2, 12)


def loaded(folder, dtype="auto"):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits.float()


def filled(adapter, scale=0.3):
    with torch.no_grad():
        adapter.vectors.copy_(scale * torch.randn(adapter.vectors.shape, generator=torch.Generator().manual_seed(7)))
    return adapter


@pytest.fixture
def base(make_model, tokenizer, tmp_path) -> Path:
    """A checkpoint with its tokenizer, and a file that is neither."""
    folder = tmp_path / "my-base"
    make_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text("notes", encoding="utf-8")
    return folder


def written(base, path, config=None, trained_in="auto", scale=0.3) -> Path:
    model = loaded(base, trained_in)
    return tl.save(filled(tl.attach(model, config or tl.TinyLoraConfig(u=3, n_tie=4)), scale), path)


@pytest.fixture
def file(base, tmp_path) -> Path:
    return written(base, tmp_path / "a.tinylora")


def adapted_logits(base, file, **options) -> torch.Tensor:
    """What the adapter computes; far from the base."""
    model = loaded(base)
    untouched = logits(model)
    adapter = tl.load(model, file, **options)
    ours = logits(model)
    assert adapter.num_parameters
    assert (ours - untouched).norm() > 0.03 * ours.norm()
    return ours


def close(theirs, ours, tolerance=2e-6) -> bool:
    return (theirs - ours).norm() < tolerance * ours.norm()


def exported(capsys, *argv) -> dict:
    assert main(["export", *map(str, argv), "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


def refused(capsys, *argv) -> str:
    """The one line on stderr, the progress aside."""
    assert main(["export", *map(str, argv)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = (each for each in captured.err.splitlines() if not each.startswith("["))
    assert line.startswith("tinylora export: error: ")
    return line


def in_peft(base, folder):
    """A fresh base with the adapter as PEFT loads it; a warning, as of keys that are missing, is an error."""
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)  # of names between PEFT and transformers
        return peft.PeftModel.from_pretrained(loaded(base), folder).eval()


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.mark.parametrize("kind", ["lora", "peft"])
def test_peft_computes_the_same(capsys, base, file, tmp_path, kind):
    out = tmp_path / "out"
    result = exported(capsys, file, "--base", base, "--to", kind, "--out", out)
    assert close(logits(in_peft(base, out)), adapted_logits(base, file))
    assert result["files"] == {name: len(content) for name, content in contents(out).items()}
    assert result["bytes"] == sum(result["files"].values())
    assert (result["to"], result["folder"], result["modules"], result["parameters"]) == (kind, str(out), 14, 12)
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "my-base"


def test_a_merged_checkpoint_needs_no_adapter(capsys, base, file, tmp_path):
    out, before = tmp_path / "deep" / "out", contents(base)
    result = exported(capsys, file, "--base", base, "--to", "merged", "--out", out)
    merged = loaded(out)
    assert close(logits(merged), adapted_logits(base, file))
    assert {name for name, _ in merged.named_parameters()} == {name for name, _ in loaded(base).named_parameters()}
    assert contents(base) == before
    assert list(out.parent.iterdir()) == [out]

    names = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert names == {name for name in contents(out) if "token" in name or "chat" in name}
    assert all(contents(out)[name] == before[name] for name in names)
    assert "README.md" not in contents(out)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert config["dtype"] == "float32"
    assert str(tmp_path) not in json.dumps(config)
    assert result["files"].keys() == contents(out).keys()
    assert result["merge"]["dtype"] == "float32"
    assert result["merge"]["kept"] == pytest.approx(1, abs=1e-4)


def test_a_merge_rounds_once_and_says_what_that_takes(capsys, base, tmp_path):
    file = written(base, tmp_path / "a.tinylora", scale=2e-3)
    result = exported(capsys, file, "--base", base, "--to", "merged", "--out", tmp_path / "out", "--dtype", "bf16")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    model = loaded(base)
    adapter = tl.load(model, file)
    wanted, realised = [], []
    for name, weight in model.named_parameters():
        delta = adapter.delta(name.removesuffix(".weight")) if name.removesuffix(".weight") in adapter.names else None
        exact = weight.detach().double() if delta is None else weight.detach().double() + delta.double()
        if name in stored:  # the head, where it is tied, is not
            assert torch.equal(stored[name], exact.float().bfloat16())
        if delta is not None:
            wanted.append(delta.double().flatten())
            realised.append((stored[name].double() - weight.detach().bfloat16().double()).flatten())
    D, change = torch.cat(wanted), torch.cat(realised)
    assert result["merge"]["dtype"] == "bfloat16"
    assert result["merge"]["kept"] == pytest.approx(float(change @ D / (D @ D)), rel=1e-3)
    assert result["merge"]["cosine"] == pytest.approx(float(change @ D / (D.norm() * change.norm())), rel=1e-3)
    assert result["merge"]["cosine"] < 0.9
    assert json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"


def test_a_base_is_merged_in_the_dtype_of_the_training(capsys, base, tmp_path):
    file = written(base, tmp_path / "a.tinylora", trained_in=torch.bfloat16)
    exported(capsys, file, "--base", base, "--to", "merged", "--out", tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    model = loaded(base, torch.bfloat16)
    adapter = tl.load(model, file)
    for name in adapter.names:
        exact = model.get_submodule(name).weight.detach().float() + adapter.delta(name)
        assert torch.equal(stored[f"{name}.weight"], exact.bfloat16())


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_a_lora_in_half_precision(capsys, base, file, tmp_path, dtype, torch_dtype):
    exported(capsys, file, "--base", base, "--to", "lora", "--out", tmp_path / "out", "--dtype", dtype)
    assert {t.dtype for t in load_file(tmp_path / "out" / "adapter_model.safetensors").values()} == {torch_dtype}
    assert close(logits(in_peft(base, tmp_path / "out")), adapted_logits(base, file), 0.02)


def test_a_calibrated_adapter_with_its_basis_elsewhere(capsys, base, tmp_path):
    model = loaded(base)
    names = tuple(site.name for site in find_target_modules(model))
    basis = tl.Basis(torch.randn(3, len(names), 2, 2, generator=torch.Generator().manual_seed(0)), names)
    file = tl.save(filled(tl.attach(model, tl.TinyLoraConfig(u=3, n_tie="all", projection=basis))), tmp_path / "a")
    stored = tl.save_basis(basis, tmp_path / "bases" / "b.safetensors")
    call = (file, "--base", base, "--to", "lora", "--out", tmp_path / "out")
    assert "needs the calibrated basis" in refused(capsys, *call)
    assert not (tmp_path / "out").exists()
    exported(capsys, *call, "--basis", stored)
    assert close(logits(in_peft(base, tmp_path / "out")), adapted_logits(base, file, basis=stored))


def test_from_a_folder_of_peft(capsys, base, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.TinyLoraConfig(target_modules=["q_proj", "down_proj"], r=2, u=3, weight_tying=0.5)
    theirs = peft.get_peft_model(loaded(base), config)
    with torch.no_grad():
        for vector in theirs.base_model.tinylora_v["default"].values():
            vector.copy_(torch.randn(3, generator=torch.Generator().manual_seed(3)))
    theirs.save_pretrained(tmp_path / "theirs")
    for kind in ("lora", "merged"):
        exported(capsys, tmp_path / "theirs", "--base", base, "--to", kind, "--out", tmp_path / kind)
    assert close(logits(in_peft(base, tmp_path / "lora")), logits(theirs.eval()))
    assert close(logits(loaded(tmp_path / "merged")), logits(theirs.eval()))


def test_how_vllm_serves_a_lora(capsys, base, file, tmp_path):
    out = tmp_path / "my lora"
    assert main(["export", str(file), "--base", str(base), "--to", "lora", "--out", str(out)]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("serve it: "))
    command = shlex.split(line.removeprefix("serve it: "))
    assert command == [
        "vllm",
        "serve",
        str(base.resolve()),
        "--enable-lora",
        "--lora-modules",
        f"a={out.resolve()}",
        "--max-lora-rank",
        "8",
    ]


def test_vllm_reads_a_name_with_signs_of_its_own(capsys, base, file, tmp_path):
    shutil.copy(file, tmp_path / "lr=1.tinylora")
    result = exported(capsys, tmp_path / "lr=1.tinylora", "--base", base, "--to", "lora", "--out", tmp_path / "a,b")
    command = shlex.split(result["serve"])
    module = json.loads(command[command.index("--lora-modules") + 1])
    assert module == {"name": "lr=1", "path": str((tmp_path / "a,b").resolve())}


def test_vllm_is_told_of_a_rank_above_its_default(capsys, base, tmp_path):
    config = tl.TinyLoraConfig(rank=20, u=3, target_modules=["gate_proj"])
    file = written(base, tmp_path / "a.tinylora", config)
    result = exported(capsys, file, "--base", base, "--to", "lora", "--out", tmp_path / "out")
    command = shlex.split(result["serve"])
    assert command[-2:] == ["--max-lora-rank", "32"]


def test_in_words(capsys, base, file, tmp_path):
    assert main(["export", str(file), "--base", str(base), "--to", "merged", "--out", str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    for text in ("parameters  12 ", "modules     14 ", "model.safetensors=", "kept=1,"):
        assert text in captured.out
    steps = [line.partition("] ")[2] for line in captured.err.splitlines()]
    assert steps[:2] == ["loading the base", "attaching the adapter"]
    assert steps[-1] == "writing"


def test_the_nano_base(capsys, tmp_path):
    model, tokenizer = nano.load()
    adapter = filled(tl.attach(model, tl.plan(model, 13)), 0.02)
    file = tl.save(adapter, tmp_path / "a.tinylora", dtype="fp32")
    lora = exported(capsys, file, "--base", "nano", "--to", "lora", "--out", tmp_path / "lora")
    assert lora["modules"] == 49
    assert shlex.split(lora["serve"])[:3] == ["vllm", "serve", str((nano.CHECKPOINTS / nano.BASE).resolve())]
    assert "--skip-tokenizer-init" in lora["serve"], "AutoTokenizer would take Qwen2's own"
    assert "PreTrainedTokenizerFast and send vLLM token ids;" in lora["note"]
    merged = exported(capsys, file, "--base", "nano", "--to", "merged", "--out", tmp_path / "merged")
    assert close(logits(loaded(tmp_path / "merged")), logits(model))
    question = nano.task().test[0].prompt
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path / "merged")
    assert theirs(question).input_ids == tokenizer(question).input_ids
    assert "PreTrainedTokenizerFast; " in merged["note"]
    assert not [name for name in merged["files"] if "basis" in name]


def test_a_warning_takes_one_line(capsys, base, tmp_path):
    file = written(base, tmp_path / "a.tinylora", tl.TinyLoraConfig(u=2, tying="structured", n_tie=2))
    call = [str(part) for part in ("export", file, "--base", base, "--to", "peft", "--out", tmp_path / "out")]
    assert main([*call, "--json"]) == 0
    captured = capsys.readouterr()
    (warning,) = (line for line in captured.err.splitlines() if line.startswith("warning: "))
    assert "no weight_tying of PEFT ties modules as this adapter does" in warning


@pytest.mark.parametrize("kind", ["lora", "peft", "merged"])
def test_what_is_there_stays_and_nothing_is_loaded_for_it(capsys, monkeypatch, base, file, tmp_path, kind):
    monkeypatch.setattr(shared, "load_adapted", lambda *args: pytest.fail("it has begun to load"))
    (tmp_path / "file").write_text("notes", encoding="utf-8")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("notes", encoding="utf-8")
    for out in (tmp_path / "file", tmp_path / "notes", base):
        assert f"{out} exists and is" in refused(capsys, file, "--base", base, "--to", kind, "--out", out)
    assert (tmp_path / "file").read_text(encoding="utf-8") == "notes"
    assert [path.name for path in (tmp_path / "notes").iterdir()] == ["a.txt"]


@pytest.mark.parametrize("kind", ["lora", "peft", "merged"])
def test_an_empty_folder_is_filled_and_an_export_replaced(capsys, base, file, tmp_path, kind):
    out = tmp_path / "out"
    out.mkdir()
    call = (file, "--base", base, "--to", kind, "--out", out)
    exported(capsys, *call)
    first = contents(out)
    assert len(first) >= 2
    if kind == "merged":  # it is gigabytes, and may be anybody's
        assert "is not empty" in refused(capsys, *call)
    else:
        exported(capsys, *call)
    assert contents(out) == first


def test_a_write_that_fails_leaves_nothing(capsys, monkeypatch, base, file, tmp_path):
    def full(source, target):
        raise OSError("no space left on device")

    monkeypatch.setattr(shutil, "copy", full)
    before = sorted(tmp_path.iterdir())
    call = (file, "--base", base, "--to", "merged", "--out", tmp_path / "out")
    assert "no space left on device" in refused(capsys, *call)
    assert sorted(tmp_path.iterdir()) == before


def test_numbers_that_do_not_fit_are_refused(capsys, base, tmp_path):
    file = written(base, tmp_path / "a.tinylora", scale=1e6)
    for kind, reason in (("merged", "not finite in torch.float16; merge in float32"), ("lora", "too large for fp16")):
        call = (file, "--base", base, "--to", kind, "--out", tmp_path / "out", "--dtype", "fp16")
        assert reason in refused(capsys, *call)
        assert not (tmp_path / "out").exists()


def test_a_weight_that_two_modules_share_is_not_merged(capsys, make_model, tmp_path):
    make_model(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    file = written(tmp_path / "tied", tmp_path / "a.tinylora", tl.TinyLoraConfig(target_modules=["lm_head"]))
    call = (file, "--base", tmp_path / "tied", "--to", "merged", "--out", tmp_path / "out")
    assert "lm_head shares its weight with model.embed_tokens" in refused(capsys, *call)


def test_a_quantized_base_is_not_merged(capsys, monkeypatch, base, file, tmp_path):
    load = shared.load_adapted

    def quantized(*args):
        model, adapter = load(*args)
        model.hf_quantizer = object()
        return model, adapter

    monkeypatch.setattr(shared, "load_adapted", quantized)
    call = (file, "--base", base, "--to", "merged", "--out", tmp_path / "out")
    assert "the base is quantized" in refused(capsys, *call)


def test_mistakes_take_one_line(capsys, make_model, base, file, tmp_path):
    out = ("--out", tmp_path / "out")
    assert "--dtype is of lora, gguf-lora and merged" in refused(
        capsys, file, "--base", base, "--to", "peft", *out, "--dtype", "bf16"
    )
    assert "no folder at nowhere" in refused(capsys, file, "--base", "nowhere", "--to", "lora", *out)
    assert "no adapter file at" in refused(capsys, tmp_path / "b", "--base", base, "--to", "lora", *out)
    exported(capsys, file, "--base", base, "--to", "lora", "--out", tmp_path / "lora")
    assert "holds a LORA adapter" in refused(capsys, tmp_path / "lora", "--base", base, "--to", "peft", *out)
    make_model(seed=1).save_pretrained(tmp_path / "other")
    assert "was made for my-base" in refused(capsys, file, "--base", tmp_path / "other", "--to", "lora", *out)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing", ["--base", "--to", "--out"])
def test_what_must_be_said(capsys, missing):
    said = [part for name in ("--base", "--to", "--out") if name != missing for part in (name, "lora")]
    with pytest.raises(SystemExit) as stop:
        main(["export", "a.tinylora", *said])
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert f"required: {missing}" in captured.err
    assert captured.err.count("\n") == 1
