"""A calibrated basis: what it holds, whom it fits, and that its file comes back whole or is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tinylora_lite import Basis, load_basis, save_basis

NAMES = ("layers.0.up_proj", "layers.1.up_proj", "layers.2.up_proj")


@pytest.fixture
def basis() -> Basis:
    flat = torch.linalg.qr(torch.randn(12, 5, generator=torch.Generator().manual_seed(0)))[0].T
    return Basis(flat.reshape(5, 3, 2, 2).contiguous(), NAMES, "split", {"task": "tiny", "seed": 3})


def test_a_modules_projection_is_its_slice_of_the_first_directions(basis):
    P = basis.projection("layers.1.up_proj", 2)
    assert torch.equal(P, basis.directions[:2, 1])
    assert basis.rank == 2


def test_the_file_comes_back(basis, tmp_path):
    path = save_basis(basis, tmp_path / "new" / "folder" / "a.basis")
    found = load_basis(path)
    assert torch.equal(found.directions, basis.directions)
    assert (found.names, found.sigma, found.provenance) == (basis.names, basis.sigma, basis.provenance)
    assert found.fingerprint() == basis.fingerprint()
    assert [each.name for each in path.parent.iterdir()] == ["a.basis"]
    assert save_basis(found, tmp_path / "b").read_bytes() == path.read_bytes()


def test_a_slice_and_a_parameter_are_saved_by_value(basis, tmp_path):
    part = Basis(basis.directions[::2], NAMES)
    assert torch.equal(load_basis(save_basis(part, tmp_path / "a")).directions, basis.directions[::2])


def test_the_fingerprint_tells_bases_apart_and_not_their_stories(basis):
    print_ = basis.fingerprint()
    assert Basis(basis.directions.clone(), NAMES, "split", {"told": "otherwise"}).fingerprint() == print_
    changed = basis.directions.clone()
    changed[4, 2, 1, 1] = torch.nextafter(changed[4, 2, 1, 1], torch.tensor(9.0))
    others = [
        Basis(changed, NAMES, "split"),
        Basis(basis.directions, NAMES, "left"),
        Basis(basis.directions, NAMES[::-1], "split"),
        Basis(basis.directions[:4], NAMES, "split"),
    ]
    assert len({print_, *(other.fingerprint() for other in others)}) == 5
    numbers = torch.arange(12.0)
    one, four = Basis(numbers.reshape(1, 3, 2, 2), NAMES), Basis(numbers.reshape(4, 3, 1, 1), NAMES)
    assert one.fingerprint() != four.fingerprint()


@pytest.mark.parametrize(
    ("directions", "names", "message"),
    [
        (torch.zeros(2, 2, 2, 2), NAMES, r"shape \[directions, 3 modules, r, r\], not \[2, 2, 2, 2\]"),
        (torch.zeros(2, 3, 2, 4), NAMES, r"not \[2, 3, 2, 4\]"),
        (torch.zeros(0, 3, 2, 2), NAMES, r"not \[0, 3, 2, 2\]"),
        (torch.zeros(3, 2, 2), NAMES, r"not \[3, 2, 2\]"),
        (torch.zeros(2, 3, 2, 2, dtype=torch.float64), NAMES, r"float32, not torch.float64; convert"),
        (torch.full((2, 3, 2, 2), torch.nan), NAMES, "NaN or infinity"),
        (torch.zeros(2, 3, 2, 2), (*NAMES[:2], NAMES[0]), "every module once"),
    ],
)
def test_what_is_no_basis(directions, names, message):
    with pytest.raises(ValueError, match=message):
        Basis(directions, names)


def test_modules_of_another_model(basis):
    basis.check_modules(NAMES, [*NAMES, "lm_head"])
    basis.check_modules(NAMES[1:], NAMES)
    with pytest.raises(ValueError, match=r"no directions for module layers\.3\.up_proj; calibrate one on this model"):
        basis.check_modules(["layers.3.up_proj"], [*NAMES, "layers.3.up_proj"])
    with pytest.raises(ValueError, match=r"of a model that has a module layers\.2\.up_proj"):
        basis.check_modules(NAMES[:2], NAMES[:2])


def test_a_basis_is_checked_against_the_config(basis):
    basis.check(rank=2, u=5, sigma="split")
    with pytest.raises(ValueError, match="holds 5 directions, fewer than u=6"):
        basis.check(rank=2, u=6, sigma="split")


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no basis file at .*tl\.calibrate"):
        load_basis(tmp_path / "absent")


def test_damage_anywhere_is_noticed(basis, tmp_path):
    path = save_basis(basis, tmp_path / "a")
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    for position in (8 + header, 8 + header + 101, len(whole) - 1):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
        with pytest.raises(ValueError, match="is damaged or no basis file"):
            load_basis(path)
    for length in (0, 7, 8 + header // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"is damaged or no basis file .*; make it again with tl\.calibrate$"):
            load_basis(path)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "tinylora-adapter-1"},
        {"format": None},
        {"names": None},
        {"names": "abc"},
        {"names": 3},
        {"names": NAMES[:2]},
        {"names": NAMES[::-1]},
        {"sigma": None},
        {"sigma": "left"},
        {"fingerprint": None},
    ],
)
def test_metadata_that_are_foreign_missing_or_edited(basis, tmp_path, change):
    path = save_basis(basis, tmp_path / "a")
    length = int.from_bytes(path.read_bytes()[:8], "little")
    metadata = json.loads(json.loads(path.read_bytes()[8 : 8 + length])["__metadata__"]["tinylora"]) | change
    metadata = {key: value for key, value in metadata.items() if value is not None}
    save_file(load_file(path), path, {"tinylora": json.dumps(metadata)})
    with pytest.raises(ValueError, match="is damaged or no basis file"):
        load_basis(path)


def test_another_safetensors_file(tmp_path):
    for metadata in (None, {"format": "pt"}, {"tinylora": "{}"}):
        save_file({"weight": torch.ones(2)}, tmp_path / "a", metadata)
        with pytest.raises(ValueError, match="its format is None, not 'tinylora-basis-1'"):
            load_basis(tmp_path / "a")
    for text in ("not json", "[1]"):
        save_file({"weight": torch.ones(2)}, tmp_path / "a", {"tinylora": text})
        with pytest.raises(ValueError, match="is damaged or no basis file"):
            load_basis(tmp_path / "a")


def test_a_loaded_basis_does_not_change_with_its_file(basis, tmp_path):
    path = save_basis(basis, tmp_path / "basis.safetensors")
    loaded = load_basis(path)
    with path.open("r+b") as file:
        file.write(b"\1" * path.stat().st_size)
    assert torch.equal(loaded.directions, basis.directions)


def test_nothing_is_left_of_a_failed_save(basis, tmp_path, monkeypatch):
    path = save_basis(basis, tmp_path / "a")
    before = path.read_bytes()

    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save_basis(Basis(basis.directions * 2, NAMES), path)
    assert [each.name for each in tmp_path.iterdir()] == ["a"]
    assert path.read_bytes() == before


def test_a_provenance_that_json_cannot_hold(basis, tmp_path):
    with pytest.raises(TypeError):
        save_basis(Basis(basis.directions, NAMES, provenance={"task": object()}), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
