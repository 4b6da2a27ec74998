"""inspect: what stands in a file, checked against the file's own bytes; what a merge loses, counted with numpy."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import tinylora_lite as tl
from tinylora_lite import nano
from tinylora_lite.adapter.layer import Factors
from tinylora_lite.adapter.tying import find_target_modules
from tinylora_lite.adapter.weights import base_fingerprint
from tinylora_lite.cli import main
from tinylora_lite.files.file_format import FORMAT, checksum, read_safetensors, write_safetensors

PEFT_FILES = Path(__file__).parents[1] / "files" / "peft_files"
DOWN = "model.layers.1.mlp.down_proj"


def filled(adapter, scale=0.3):
    with torch.no_grad():
        adapter.vectors.copy_(scale * torch.randn(adapter.vectors.shape, generator=torch.Generator().manual_seed(7)))
    return adapter


@pytest.fixture
def base(make_model, tmp_path) -> Path:
    """The folder of a checkpoint, with values that bfloat16 holds too."""
    make_model().bfloat16().float().save_pretrained(tmp_path / "my-base")
    return tmp_path / "my-base"


def loaded(folder, dtype="auto"):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def written(folder, path, config=None, scale=0.3, trained_in="auto", **options) -> Path:
    """An adapter file for the base in a folder."""
    model = loaded(folder, trained_in)
    return tl.save(filled(tl.attach(model, config or tl.TinyLoraConfig(u=13, n_tie="all")), scale), path, **options)


@pytest.fixture
def file(base, tmp_path) -> Path:
    return written(base, tmp_path / "a.tinylora")


def rewrite(file: Path, change) -> None:
    """Edits header and tensors under a checksum that fits."""
    header, tensors = read_safetensors(file, FORMAT)
    change(header, tensors)
    write_safetensors(file, header | {"checksum": checksum(header, tensors)}, tensors)


def inspected(capsys, *argv) -> dict:
    assert main(["inspect", *map(str, argv), "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


def in_words(capsys, *argv) -> str:
    assert main(["inspect", *map(str, argv)]) == 0
    return capsys.readouterr().out


def refused(capsys, *argv) -> str:
    """The one line on stderr, the progress aside."""
    assert main(["inspect", *map(str, argv)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = (each for each in captured.err.splitlines() if not each.startswith("["))
    assert line.startswith("tinylora inspect: error: ")
    return line


def test_what_stands_in_a_file(capsys, base, file):
    found = inspected(capsys, file)
    stored = load_file(file)["vectors"]
    assert stored.dtype == torch.bfloat16
    assert (found["kind"], found["format"], found["checksum"]) == ("tinylora", "tinylora-adapter-1", "verified")
    assert (found["parameters"], found["dtype"], found["payload_bytes"]) == (13, "bf16", 26)
    assert found["bytes"] == file.stat().st_size
    assert found["vectors"]["shape"] == [1, 13]
    assert found["vectors"]["values"] == stored.float().tolist()
    values = stored.double().numpy()
    assert found["vectors"]["norm"] == pytest.approx(np.sqrt((values**2).sum()))
    assert (found["vectors"]["smallest"], found["vectors"]["largest"]) == (values.min(), values.max())
    assert {name: found["settings"][name] for name in ("rank", "u", "n_tie", "sigma", "seed")} == {
        "rank": 2,
        "u": 13,
        "n_tie": "all",
        "sigma": "left",
        "seed": 0,
    }
    fingerprint = base_fingerprint(loaded(base))
    assert found["base"] == {
        "name": "my-base",
        "revision": None,
        "dtype": "float32",
        "gguf": None,
        "sha256": fingerprint,
    }
    assert (found["modules"], found["stored_factors"], found["basis"]) == (14, [], None)
    assert "merge" not in found


def test_in_words(capsys, file):
    out = in_words(capsys, file)
    lines = {" ".join(line.split()) for line in out.splitlines()}
    assert {"parameters 13", "payload bytes 26", "dtype bf16", "checksum verified", "modules 14"} < lines
    assert "projection=random" in out
    assert "name=my-base, dtype=float32" in out
    assert f"{load_file(file)['vectors'][0, 4].item():.4g}" in out


@pytest.mark.parametrize(("dtype", "size"), [("fp32", 4), ("fp16", 2)])
def test_other_precisions(capsys, base, tmp_path, dtype, size):
    found = inspected(capsys, written(base, tmp_path / "a.tinylora", dtype=dtype))
    assert (found["dtype"], found["payload_bytes"]) == (dtype, 13 * size)


def test_many_numbers_are_summed_up(capsys, base, tmp_path):
    file = written(base, tmp_path / "a.tinylora", tl.lora_xs(rank=9))
    found = inspected(capsys, file)
    assert (found["parameters"], found["vectors"]["values"]) == (14 * 81, None)
    out = in_words(capsys, file)
    assert "projection=identity" in out
    assert f"norm={found['vectors']['norm']:.4g}" in out
    assert len(out) < 1500


def test_a_calibrated_basis_is_found_or_not(capsys, base, tmp_path):
    model = loaded(base)
    names = tuple(site.name for site in find_target_modules(model))
    basis = tl.Basis(torch.randn(3, len(names), 2, 2, generator=torch.Generator().manual_seed(0)), names)
    other = tl.Basis(-basis.directions, names)
    adapter = tl.attach(model, tl.TinyLoraConfig(u=3, n_tie="all", projection=basis))
    file = tl.save(filled(adapter), tmp_path / "adapter" / "a.tinylora")
    right = tl.save_basis(basis, tmp_path / "bases" / "right.safetensors")
    wrong = tl.save_basis(other, tmp_path / "wrong.safetensors")

    assert inspected(capsys, file)["basis"] == {"fingerprint": basis.fingerprint(), "found": False}
    assert "give it with --basis" in " ".join(in_words(capsys, file).split())
    assert "needs the calibrated basis" in refused(capsys, file, "--base", base)
    assert basis.fingerprint()[:12] in refused(capsys, file, "--basis", wrong)
    for given in (right, right.parent):
        assert inspected(capsys, file, "--basis", given)["basis"]["found"]
    assert inspected(capsys, file, "--base", base, "--basis", right)["fits"]
    shutil.copy(right, file.parent)
    assert inspected(capsys, file)["basis"]["found"]
    assert f"{basis.fingerprint()[:12]}, found" in in_words(capsys, file)


def test_stored_factors(capsys, base, tmp_path):
    model = loaded(base)
    random = torch.Generator().manual_seed(3)
    parts = [torch.randn(*shape, generator=random) for shape in ((32, 2), (2, 48), (13, 2, 2))]
    adapter = tl.attach(model, tl.TinyLoraConfig(u=13, n_tie="all"), factors={DOWN: Factors(*parts)})
    file = tl.save(filled(adapter), tmp_path / "a.tinylora")
    assert inspected(capsys, file)["stored_factors"] == [13]
    assert re.search(r"stored factors +13 *\n", in_words(capsys, file))
    # Only the base knows the names.
    assert inspected(capsys, file, "--base", base)["stored_factors"] == [DOWN]
    everything = tl.save(adapter, tmp_path / "b.tinylora", factors=True)
    assert inspected(capsys, everything)["stored_factors"] == list(range(14))


def rounded(values: np.ndarray) -> np.ndarray:
    """To bfloat16, to nearest and ties to even, on the bits."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    return (((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16).astype(np.uint32).view(np.float32).astype(np.float64)


def test_the_merge_is_counted_as_numpy_counts_it(capsys, base, tmp_path):
    file = written(base, tmp_path / "a.tinylora", tl.TinyLoraConfig(u=2, n_tie=3), scale=0.02)
    merge = inspected(capsys, file, "--base", base)["merge"]
    model = loaded(base)
    adapter = tl.load(model, file)
    assert (merge["dtype"], list(merge["modules"])) == ("bf16", list(adapter.names))
    wanted, realised, weights = [], [], []
    for name in adapter.names:
        W = model.get_submodule(name).weight.detach().numpy()
        D = adapter.delta(name).numpy()
        weights.append(W.astype(np.float64).ravel())
        wanted.append(D.astype(np.float64).ravel())
        realised.append((rounded(W + D) - rounded(W)).ravel())
    rows = [*zip(wanted, realised, weights, strict=True), tuple(map(np.concatenate, (wanted, realised, weights)))]
    for (D, change, W), found in zip(rows, [*merge["modules"].values(), merge["total"]], strict=True):
        assert found["changed"] == pytest.approx((change != 0).mean())
        assert found["kept"] == pytest.approx(change @ D / (D @ D), rel=1e-4)
        assert found["cosine"] == pytest.approx(change @ D / np.sqrt((D @ D) * (change @ change)), rel=1e-4)
        assert found["size"] == pytest.approx(np.sqrt((D @ D) / (W @ W)), rel=1e-4)
    assert 0 < merge["total"]["changed"] < 1


@pytest.mark.parametrize(
    ("scale", "dtype", "flag"), [(0.3, "bf16", None), (1e-5, "bf16", "lost"), (1e-5, "fp32", None), (0.0, "bf16", None)]
)
def test_what_a_merge_loses_is_flagged(capsys, base, tmp_path, scale, dtype, flag):
    file = written(base, tmp_path / "a.tinylora", scale=scale)
    merge = inspected(capsys, file, "--base", base, "--dtype", dtype)["merge"]
    assert {effect["flag"] for effect in [*merge["modules"].values(), merge["total"]]} == {flag}
    out = in_words(capsys, file, "--base", base, "--dtype", dtype)
    assert f"A merge in {dtype}" in out
    assert DOWN in out
    rows = [line for line in out.splitlines() if line.strip().startswith(("model.layers.", "all"))]
    assert len(rows) == 15
    assert all(line.rstrip().endswith("lost") for line in rows) == (flag == "lost")
    assert ("spoils the update in 14 of 14 modules" in out) == (flag == "lost")


def test_rounding_noise_is_flagged(capsys, make_model, tmp_path):
    """Off the grid of bfloat16, roundings up and down balance: all is kept on average, under noise."""
    make_model().save_pretrained(tmp_path / "fine")
    file = written(tmp_path / "fine", tmp_path / "a.tinylora", scale=2e-3)
    total = inspected(capsys, file, "--base", tmp_path / "fine")["merge"]["total"]
    assert total["kept"] > 0.5
    assert total["cosine"] < 0.9
    assert total["flag"] == "noisy"


def test_the_base_comes_in_the_dtype_of_the_training(capsys, make_model, tmp_path):
    make_model().save_pretrained(tmp_path / "fine")
    file = written(tmp_path / "fine", tmp_path / "a.tinylora", trained_in=torch.bfloat16)
    with pytest.raises(tl.AdapterFileError, match="load that base in bfloat16, not in float32"):
        tl.load(loaded(tmp_path / "fine"), file)
    assert inspected(capsys, file, "--base", tmp_path / "fine")["fits"]


def test_another_base(capsys, make_model, file, tmp_path):
    make_model(seed=1).save_pretrained(tmp_path / "other")
    assert "was made for my-base, and this model's weights differ" in refused(
        capsys, file, "--base", tmp_path / "other"
    )
    make_model(num_hidden_layers=1).save_pretrained(tmp_path / "short")
    assert "adapted modules differ from the 7" in refused(capsys, file, "--base", tmp_path / "short")


def test_the_nano_base(capsys, tmp_path):
    model, _ = nano.load()
    file = tl.save(filled(tl.attach(model, tl.plan(model, 13)), 0.02), tmp_path / "a.tinylora")
    found = inspected(capsys, file, "--base", "nano")
    assert (found["fits"], found["parameters"], len(found["merge"]["modules"])) == (True, 13, 49)


def test_a_log_gets_plain_lines(capsys, base, file):
    assert main(["inspect", str(file), "--base", str(base), "--json"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("] ")[2] for line in lines] == [
        "loading the base",
        "attaching the adapter",
        "merging 14 modules",
    ]


def test_a_tinylora_of_peft(capsys, tmp_path):
    folder = PEFT_FILES / "0.20.0" / "with_p"
    found = inspected(capsys, folder)
    stored = load_file(folder / "adapter_model.safetensors")
    vectors = [stored[key].tolist() for key in sorted(stored) if ".tinylora_v." in key]
    assert (found["kind"], found["dtype"], found["modules"]) == ("PEFT TINYLORA", "fp32", 6)
    assert (found["vectors"]["values"], found["parameters"], found["payload_bytes"]) == (vectors, 12, 48)
    assert found["settings"]["weight_tying"] == 0.3
    assert sorted(found["stored_factors"]) == sorted(
        key.removeprefix("base_model.model.").removesuffix(".tinylora_A") for key in stored if key.endswith("_A")
    )
    assert found["bytes"] == sum((folder / f"adapter_{n}").stat().st_size for n in ("config.json", "model.safetensors"))
    assert "save_projection=yes" in in_words(capsys, folder)
    assert "save_projection=no" in in_words(capsys, PEFT_FILES / "0.20.0" / "without_p")


def test_a_tinylora_of_peft_on_its_base(capsys, base, file, tmp_path):
    model = loaded(base)
    tl.export_peft(tl.load(model, file), tmp_path / "peft")
    ours = inspected(capsys, file, "--base", base)["merge"]
    theirs = inspected(capsys, tmp_path / "peft", "--base", base)
    assert theirs["fits"]
    for name in ("changed", "kept", "cosine", "size"):
        assert theirs["merge"]["total"][name] == pytest.approx(ours["total"][name], rel=1e-3)


def test_a_lora_is_described(capsys, base, file, tmp_path):
    model = loaded(base)
    folder = tl.export_lora(tl.load(model, file), tmp_path / "lora")
    found = inspected(capsys, folder)
    stored = load_file(folder / "adapter_model.safetensors")
    assert (found["kind"], found["settings"]["r"], found["modules"]) == ("PEFT LORA", 2, 14)
    assert found["parameters"] == sum(tensor.numel() for tensor in stored.values())
    assert found["bytes"] == sum((folder / f"adapter_{n}").stat().st_size for n in ("config.json", "model.safetensors"))
    assert found["base"]["name"] == "my-base"
    assert re.search(r"kind +PEFT LORA", in_words(capsys, folder))
    assert "holds a LORA adapter" in refused(capsys, folder, "--base", base)


def test_what_a_file_leaves_out_has_its_default(capsys, base, file):
    rewrite(
        file, lambda header, _: [header["settings"].pop(n) for n in ("projection", "seed")] + [header.pop("base_dtype")]
    )
    assert tl.load(loaded(base), file).config.projection == "random"
    found = inspected(capsys, file)
    assert (found["settings"]["projection"], found["settings"]["seed"], found["base"]["dtype"]) == ("random", 0, None)
    rewrite(file, lambda header, _: header.pop("settings"))
    assert "lacks settings" in refused(capsys, file)


@pytest.mark.parametrize(
    ("vectors", "reason"),
    [
        ([], "holds no vectors"),
        ([torch.ones(2), torch.ones(3)], "vectors of different lengths"),
        ([torch.ones(2, dtype=torch.float64)], None),
    ],
)
def test_odd_vectors_of_peft(capsys, tmp_path, vectors, reason):
    folder = shutil.copytree(PEFT_FILES / "0.20.0" / "with_p", tmp_path / "peft")
    stored = load_file(folder / "adapter_model.safetensors")
    kept = {key: tensor for key, tensor in stored.items() if ".tinylora_v." not in key}
    kept |= {f"base_model.tinylora_v.{group}": vector for group, vector in enumerate(vectors)}
    save_file(kept, folder / "adapter_model.safetensors")
    if reason:
        assert reason in refused(capsys, folder)
    else:
        assert inspected(capsys, folder)["dtype"] == "torch.float64"


def test_a_warning_takes_one_line(capsys, base, file, tmp_path):
    """And comes once, though the folder is read once for its description and once for the base."""
    model = loaded(base)
    folder = tl.export_peft(tl.load(model, file), tmp_path / "peft")
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"tinylora_dropout": 0.5}), encoding="utf-8")
    assert main(["inspect", str(folder), "--base", str(base), "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["parameters"] == 13
    (line,) = (each for each in captured.err.splitlines() if not each.startswith("["))
    assert line.startswith("warning: ")
    assert "sets tinylora_dropout" in line


def damage(file: Path, how: str) -> None:
    content = file.read_bytes()
    if how == "cut":
        file.write_bytes(content[:200])
    elif how == "edited":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif how == "foreign":
        save_file({"weight": torch.zeros(2)}, file)
    elif how == "gone":
        file.unlink()
    else:
        file.write_bytes(b"notes")


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("cut", "is damaged or no adapter file"),
        ("edited", "its checksum does not fit its content"),
        ("foreign", "no adapter file of this library"),
        ("gone", "no adapter file at"),
        ("text", "is damaged or no adapter file"),
    ],
)
def test_a_bad_file_takes_one_line(capsys, file, how, reason):
    damage(file, how)
    assert reason in refused(capsys, file)


def test_folders_and_bases_that_cannot_be_read(capsys, base, file, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "holds no adapter_config.json" in refused(capsys, tmp_path / "empty")
    (tmp_path / "empty" / "adapter_config.json").write_text('{"peft_type": 3}', encoding="utf-8")
    assert "damaged: peft_type is 3" in refused(capsys, tmp_path / "empty")
    assert "no folder at nowhere; a base is a name of `tinylora models`, a GGUF file or the folder" in refused(
        capsys, file, "--base", "nowhere"
    )
    assert f"{tmp_path} holds no config.json; give the folder" in refused(capsys, file, "--base", tmp_path)
    assert "--dtype is of a merge" in refused(capsys, file, "--dtype", "fp16")
    (base / "model.safetensors").write_bytes(b"notes")
    assert f"no model could be loaded from {base} (" in refused(capsys, file, "--base", base)


def test_a_file_of_the_first_version(capsys):
    """It names no revision of its base."""
    path = Path(__file__).parents[1] / "files" / "stored" / "292cd09" / "random.tinylora"
    assert main(["inspect", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["parameters"], found["base"]["name"], found["base"]["revision"]) == (4, "qwen2-1m", None)
