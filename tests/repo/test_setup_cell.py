"""The door: the cell that sets a notebook up, and the line by which a page says how the library is installed."""

import json
import os
import subprocess
import sys

import pytest

from book import setup_cell

SMI = "GPU 0: Tesla T4 (UUID: GPU-1)\n"

# Runs the cell as a notebook does, in a kernel without tinylora_lite until pip has brought it.
RUN = """
import importlib.abc, os, sys
from pathlib import Path
from IPython.core.interactiveshell import InteractiveShell

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "tinylora_lite" and not Path("installed").exists():
            raise ModuleNotFoundError("No module named 'tinylora_lite'", name=name)

sys.meta_path.insert(0, Blocked())
if os.environ.get("INSTALLED"):
    Path("installed").touch()
result = InteractiveShell.instance().run_cell(Path("cell.py").read_text(encoding="utf-8"))
assert "extras" not in InteractiveShell.instance().user_ns
sys.exit(0 if result.success else 1)
"""
PIP = """
import json, os, sys
from pathlib import Path

with open("pip.jsonl", "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
if os.environ.get("PIP_ERROR"):
    print("Collecting tinylora_lite\\n" + os.environ["PIP_ERROR"], file=sys.stderr)
    sys.exit(1)
Path("installed").touch()
"""
STUB = "__version__ = '1.2'\nclass cuda:\n    is_available = staticmethod(lambda: False)\n"


@pytest.fixture
def kernel(tmp_path):
    """``kernel(extras, ...)`` runs the cell where nothing is installed; returns the process and what pip was asked."""
    pytest.importorskip("IPython")
    (tmp_path / "run.py").write_text(RUN, encoding="utf-8")
    site = tmp_path / "site"
    for name, text in {"pip/__main__.py": PIP, "pip/__init__.py": ""}.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(text, encoding="utf-8")
    for name in ("tinylora_lite", "torch", "transformers"):
        (site / f"{name}.py").write_text(STUB, encoding="utf-8")

    def run(extras="lab", *, torchao=None, smi=None, broken=None, **environment):
        (tmp_path / "cell.py").write_text(setup_cell.cell(extras), encoding="utf-8")
        if torchao is not None:
            info = site / f"torchao-{torchao}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torchao\nVersion: {torchao}\n")
        if broken is not None:
            (site / f"{broken}.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
        programs = tmp_path / "programs"
        programs.mkdir()
        if smi is not None:
            (programs / "nvidia-smi").write_text(f"#!{sys.executable}\nprint({smi!r})\n", encoding="utf-8")
            (programs / "nvidia-smi").chmod(0o755)
        done = subprocess.run(
            [sys.executable, "run.py"],
            cwd=tmp_path,
            env=os.environ | {"PATH": str(programs), "PYTHONPATH": str(site), "NO_COLOR": "1"} | environment,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        asked = tmp_path / "pip.jsonl"
        lines = asked.read_text(encoding="utf-8").splitlines() if asked.exists() else []
        return done, [json.loads(line) for line in lines]

    return run


def wanted(extras: str) -> str:
    return f"tinylora_lite[{extras}]{setup_cell.source()}"


class TestCell:
    def test_it_installs_this_version_and_says_what_is_there(self, kernel):
        done, asked = kernel("lab,peft")
        assert (done.returncode, done.stderr) == (0, "")
        assert asked == [["install", "-q", wanted("lab,peft")]]
        assert done.stdout.splitlines()[-1] == "tinylora_lite 1.2, torch 1.2, transformers 1.2, no GPU"

    def test_what_is_installed_stays(self, kernel):
        done, asked = kernel(INSTALLED="1")
        assert (done.returncode, asked) == (0, [])
        assert done.stdout.splitlines() == ["tinylora_lite 1.2, torch 1.2, transformers 1.2, no GPU"]

    @pytest.mark.parametrize(
        ("error", "reason"),
        [
            ("ERROR: no such version\nERROR: no match", "ERROR: no such version"),
            (
                "error: subprocess-exited-with-error\n  x\n   fatal: unable to access\nnote: This error",
                "fatal: unable to",
            ),
            ("python: No module named pip", "Collecting"),
        ],
    )
    def test_a_failed_install_stops_the_notebook_with_one_sentence(self, kernel, error, reason):
        done, _ = kernel(PIP_ERROR=error)
        assert done.returncode == 1
        (sentence,) = (done.stdout + done.stderr).splitlines()[1:]
        assert sentence.startswith(f"pip could not install {wanted('lab')} ({reason}")
        assert sentence.endswith("run this cell again.")

    def test_a_failed_import_stops_the_notebook_with_one_sentence(self, kernel):
        done, _ = kernel(broken="transformers", INSTALLED="1")
        assert done.returncode == 1
        (sentence,) = (done.stdout + done.stderr).splitlines()
        assert "(operator torchvision::nms does not exist): restart the kernel" in sentence

    @pytest.mark.parametrize("torchao", ["0.10.0", "0.15.0+git12"])
    @pytest.mark.parametrize("installed", ["", "1"])
    def test_an_old_torchao_is_brought_up_to_date(self, kernel, torchao, installed):
        # Colab ships 0.10, beside which PEFT refuses to load.
        _, asked = kernel(torchao=torchao, INSTALLED=installed)
        assert asked == [["install", "-q", *([] if installed else [wanted("lab")]), "torchao>=0.16"]]

    @pytest.mark.parametrize("torchao", ["0.16.0", "0.17.0.dev20260101", "1.0"])
    def test_a_new_one_stays(self, kernel, torchao):
        assert kernel(torchao=torchao, INSTALLED="1")[1] == []

    @pytest.mark.skipif(os.name == "nt", reason="the stub of nvidia-smi is a script")
    @pytest.mark.parametrize(
        ("smi", "extras"),
        [
            (SMI, "lab,train,quantized"),
            ("GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-1)\n", "lab,train,vllm"),
            ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n", "lab,train"),
            (None, "lab,train"),
        ],
        ids=["a T4 asks for bitsandbytes", "other GPUs for vLLM", "a broken driver for neither", "no GPU for neither"],
    )
    def test_a_chapter_for_gpus_takes_what_the_gpu_has_a_use_for(self, kernel, smi, extras):
        assert kernel("lab,train,quantized,vllm", smi=smi)[1] == [["install", "-q", wanted(extras)]]


def setup_cells(texts) -> dict[str, list[tuple[int, dict]]]:
    notebooks = {name: json.loads(text) for name, text in texts.items() if name.endswith(".ipynb")}
    return {
        name: [
            (place, cell)
            for place, cell in enumerate(book["cells"])
            if "colab-setup" in cell["metadata"].get("tags", [])
        ]
        for name, book in notebooks.items()
    }


def test_every_notebook_begins_with_it(texts):
    cells = setup_cells(texts)
    assert len(cells) >= 16
    assert {name: [place for place, _ in found] for name, found in cells.items()} == {name: [1] for name in cells}


def test_it_is_the_same_in_all_notebooks_but_for_the_extras(texts, project):
    for name, ((_, cell),) in setup_cells(texts).items():
        source = "".join(cell["source"])
        extras = setup_cell.extras_of(source)
        assert source == setup_cell.cell(extras), f"{name}: run python book/setup_cell.py"
        assert set(extras.split(",")) <= set(project["optional-dependencies"]), name


def test_the_extras_bring_what_the_chapters_for_gpus_ask_for(texts, project):
    extras = project["optional-dependencies"]
    assert any(each.startswith("bitsandbytes") for each in extras["quantized"])
    assert any(each.startswith("torchao>=0.1") and int(each[-2:]) >= 16 for each in extras["quantized"])
    for name, ((_, cell),) in setup_cells(texts).items():
        if "/gpu_" in name:
            assert {"train", "quantized", "vllm"} <= set(setup_cell.extras_of("".join(cell["source"])).split(","))


def test_a_cell_without_extras_is_an_error():
    with pytest.raises(ValueError, match='EXTRAS = "name,name"'):
        setup_cell.extras_of("print()")


class TestPages:
    def test_everything_says_to_install_what_can_be_installed(self):
        """Notebooks, README and landing page; until a release is on the index, from the repository at its tag."""
        stale = [path.name for path, text in setup_cell.up_to_date().items() if text != path.read_text("utf-8")]
        assert stale == [], "run python book/setup_cell.py"
        for page in setup_cell.PAGES:
            assert f"\n{setup_cell.install_line()}\n" in (setup_cell.ROOT / page).read_text(encoding="utf-8"), page
        readme = (setup_cell.ROOT / "README.md").read_text(encoding="utf-8")
        assert f"\n{setup_cell.install_line('[gguf]')}\n" in readme, "SmolLM2's file is read with it"

    @pytest.mark.parametrize("on_index", [False, True])
    def test_the_flag_says_where_from(self, monkeypatch, tmp_path, project, on_index):
        text = (setup_cell.ROOT / "pyproject.toml").read_text(encoding="utf-8")
        assert text.count("\non-index = ") == 1
        text = text.replace("\non-index = false", f"\non-index = {str(on_index).lower()}")
        (tmp_path / "pyproject.toml").write_text(text, encoding="utf-8")
        monkeypatch.setattr(setup_cell, "ROOT", tmp_path)
        version, repository = project["version"], project["urls"]["Repository"]
        setup_cell.source.cache_clear()
        try:
            if on_index:
                assert setup_cell.install_line() == "pip install tinylora_lite"
                assert setup_cell.install_line("[gguf]") == "pip install tinylora_lite[gguf]"
                assert f'SOURCE = "=={version}"' in setup_cell.cell("lab")
            else:
                assert setup_cell.install_line() == f'pip install "tinylora_lite @ git+{repository}@v{version}"'
                assert f'SOURCE = " @ git+{repository}@v{version}"' in setup_cell.cell("lab")
        finally:
            setup_cell.source.cache_clear()
