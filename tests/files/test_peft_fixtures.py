"""Folders written by real old versions of PEFT: those of 0.20.0 are read, those of 0.19.1 only where P was saved.

``tests/files/peft_files/make.py`` wrote them. PEFT itself is not needed here, and kept away.
"""

import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tinylora_lite as tl
from tinylora_lite.adapter.attached import adapter_of

HERE = Path(__file__).parent / "peft_files"


@pytest.fixture(autouse=True)
def _no_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)


def _base_and_expected(folder):
    expected = load_file(folder / "expected.safetensors")
    base = runpy.run_path(str(HERE / "make.py"))["Tower"]()
    base.load_state_dict({name.removeprefix("base."): t for name, t in expected.items() if name.startswith("base.")})
    return base, expected["x"], expected["outputs"]


@pytest.mark.parametrize("folder", ["0.19.1/with_p", "0.20.0/with_p", "0.20.0/without_p"])
def test_folders_of_old_versions_compute_what_those_versions_computed(folder):
    base, x, outputs = _base_and_expected(HERE / folder)
    untouched = base(x)
    adapter = tl.import_peft(base, HERE / folder)
    # In make.py down_proj stands first in its block, and PEFT numbers groups in that order; here q_proj comes first.
    assert dict(zip(adapter.names, adapter.groups, strict=True)) == {
        "layers.0.down_proj": 0,
        "layers.0.q_proj": 1,
        "layers.0.up_proj": 2,
        "layers.1.down_proj": 3,
        "layers.1.q_proj": 3,
        "layers.1.up_proj": 3,
    }
    assert adapter.names[:3] == ("layers.0.q_proj", "layers.0.up_proj", "layers.0.down_proj")
    assert (untouched - outputs).norm() > 0.1 * outputs.norm()
    # Another machine's products may round otherwise; on the one that made the files this is zero.
    torch.testing.assert_close(base(x), outputs, rtol=0, atol=1e-5 * float(outputs.abs().max()))


def test_what_comes_from_0_20_0_goes_back_byte_for_byte(tmp_path):
    folder = HERE / "0.20.0" / "with_p"
    base = _base_and_expected(folder)[0]
    tl.export_peft(tl.import_peft(base, folder), tmp_path / "out")
    name = "adapter_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()


def test_without_p_0_19_is_refused_with_the_reason():
    base = _base_and_expected(HERE / "0.19.1/without_p")[0]
    with pytest.raises(tl.AdapterFileError, match=r"PEFT 0\.19\.1.*another one in every process.*P is lost"):
        tl.import_peft(base, HERE / "0.19.1/without_p")
    assert adapter_of(base) is None
    assert all(p.requires_grad for p in base.parameters())


@pytest.mark.parametrize(
    ("version", "read"),
    [
        ("0.20.0", True),
        ("0.20.1.dev0@5d602fdb", True),
        ("1.0.0", True),
        ("0.19.2.dev0@UNKNOWN", False),
        ("0.9.0", False),
        ("", False),
        (None, False),
        (20, False),
    ],
)
def test_only_versions_that_draw_p_alike_may_leave_it_out(version, read, tmp_path):
    folder = shutil.copytree(HERE / "0.20.0/without_p", tmp_path / "copy")
    text = (folder / "adapter_config.json").read_text(encoding="utf-8")
    stored = {None: "null"}.get(version, f'"{version}"' if isinstance(version, str) else str(version))
    (folder / "adapter_config.json").write_text(text.replace('"0.20.0"', stored), encoding="utf-8")
    base = _base_and_expected(folder)[0]
    if read:
        assert tl.import_peft(base, folder).num_parameters == 12
    else:
        with pytest.raises(tl.AdapterFileError, match="P is lost"):
            tl.import_peft(base, folder)
