"""Files of every version so far load and compute what they computed, with and without the settings of today."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import tinylora_lite as tl
from tinylora_lite import nano
from tinylora_lite.files.basis import load_basis, save_basis
from tinylora_lite.files.file_format import KEY, checksum

HERE = Path(__file__).parent / "stored"
RECORDS = Path(__file__).parents[2] / "book" / "results"
FILES = sorted(HERE.glob("*/*.tinylora"))


@pytest.fixture(scope="module")
def base():
    return nano.load()[0]


def edited(path: Path, folder: Path, **settings) -> Path:
    """A copy of a file with other settings, ``None`` for one that is left out, and a fitting checksum."""
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()[KEY])
    left_out = {name for name, value in settings.items() if value is None}
    header["settings"] = {k: v for k, v in (header["settings"] | settings).items() if k not in left_out}
    tensors = load_file(path)
    header["checksum"] = checksum(header, tensors)
    save_file(tensors, folder / path.name, {KEY: json.dumps(header)})
    return folder / path.name


def test_both_versions_are_here():
    names = {"lora_xs", "own_basis", "random", "shipped_basis", "structured"}
    assert {path.stem for path in FILES if path.parent.name == "292cd09"} == names
    assert {path.stem for path in FILES if path.parent.name == "c5ce4e6"} == names | {"given", "groups"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_stored_file_computes_what_it_computed(base, path):
    expected = json.loads((path.parent / "expected.json").read_text(encoding="utf-8"))[path.stem]
    adapter = tl.load(base, path)
    try:
        assert len(expected) == 3
        for module, recorded in expected.items():
            delta = adapter.delta(module)
            assert float(delta.norm()) == pytest.approx(recorded["norm"], rel=1e-5)
            torch.testing.assert_close(
                delta[:2, :3], torch.tensor(recorded["corner"]), rtol=0, atol=1e-5 * float(delta.abs().max())
            )
    finally:
        adapter.detach()


def test_the_shipped_thirteen(base):
    record = json.loads((RECORDS / "thirteen.json").read_text(encoding="utf-8"))
    adapter = tl.load(base, RECORDS / "thirteen.tinylora")
    assert adapter.vectors.tolist() == [record["stored"]]
    assert adapter.config.projection.fingerprint() == nano.basis().fingerprint()
    adapter.detach()


@pytest.mark.parametrize("name", ["arithmetic", "groups", "seed", "sigma", "tying", "target_modules", "projection"])
def test_a_setting_that_the_file_lacks_has_its_default(base, tmp_path, name):
    """What a file looks like to a library that has got a setting since."""
    stored = tl.load(base, HERE / "c5ce4e6" / "random.tinylora")
    config, deltas = stored.config, {module: stored.delta(module) for module in stored.names}
    stored.detach()
    path = edited(HERE / "c5ce4e6" / "random.tinylora", tmp_path, **{name: None})
    if name == "seed":  # it was not the default, so the directions are others
        with pytest.raises(tl.AdapterFileError, match="another decomposition"):
            tl.load(base, path)
        return
    adapter = tl.load(base, path)
    assert adapter.config == config
    assert all(torch.equal(adapter.delta(module), deltas[module]) for module in deltas)
    adapter.detach()


def test_settings_that_this_version_does_not_know_are_refused_by_name(base, tmp_path):
    path = edited(HERE / "c5ce4e6" / "random.tinylora", tmp_path, alpha=2, rotation="none")
    with pytest.raises(tl.AdapterFileError, match=r"it sets alpha, rotation, unknown to this version .*; upgrade it$"):
        tl.load(base, path)
    assert not any(module._forward_hooks for module in base.modules())


@pytest.mark.parametrize("version", ["292cd09", "c5ce4e6"])
def test_a_stored_basis_is_what_it_was(version, tmp_path):
    file = HERE / version / "basis.safetensors"
    basis = load_basis(file)
    assert (len(basis.names), basis.rank, basis.sigma, basis.provenance) == (8, 2, "left", {"seed": 3})
    drawn = torch.randn(2, 8, 2, 2, generator=torch.Generator().manual_seed(3))
    assert torch.equal(basis.directions, drawn)
    assert save_basis(basis, tmp_path / "again.safetensors").read_bytes() == file.read_bytes()


def test_entries_of_a_basis_file(tmp_path):
    source = HERE / "c5ce4e6" / "basis.safetensors"
    with safe_open(source, "pt") as file:
        entries = json.loads(file.metadata()[KEY])

    def written(name: str, stored: dict) -> Path:
        save_file(load_file(source), tmp_path / name, {KEY: json.dumps(stored)})
        return tmp_path / name

    fewer = {key: value for key, value in entries.items() if key not in ("sigma", "provenance")}
    basis = load_basis(written("fewer", fewer))
    assert (basis.fingerprint(), basis.sigma, basis.provenance) == (entries["fingerprint"], "left", {})
    with pytest.raises(ValueError, match=r"sets layout, weighting, unknown to this version of .*; upgrade it$"):
        load_basis(written("more", entries | {"weighting": 1, "layout": 2}))


def test_a_calibrated_file_moves_with_its_basis(base, tmp_path):
    shutil.copy(HERE / "c5ce4e6" / "own_basis.tinylora", tmp_path)
    with pytest.raises(tl.AdapterFileError, match="not found beside it and in the package"):
        tl.load(base, tmp_path / "own_basis.tinylora")
    shutil.copy(HERE / "c5ce4e6" / "basis.safetensors", tmp_path)
    tl.load(base, tmp_path / "own_basis.tinylora").detach()
