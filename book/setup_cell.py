"""Writes the cell that sets a notebook up into every notebook, and the line that installs the library into its pages.

``python book/setup_cell.py``, in a checkout, after a change of the version, of the address or of
``[tool.tinylora_lite] on-index`` in ``pyproject.toml``; a test says when it is due. A notebook names its extras in the
line ``EXTRAS = "..."``; everything else in the cell is the same in all of them.
"""

from __future__ import annotations

import json
import re
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "book/intro.md")
TAGS = ["colab-setup", "remove-cell"]
METADATA: dict[str, Any] = {"cellView": "form", "jupyter": {"source_hidden": True}, "tags": TAGS}
"""Colab and JupyterLab fold the cell, and the book leaves it out."""

CELL = '''\
# @title Set up: installs the library where it is missing
EXTRAS = "<extras>"
SOURCE = "<source>"


def set_up(extras):
    """The same in all notebooks: book/setup_cell.py."""
    import importlib
    import shutil
    import subprocess
    import sys
    from importlib import metadata

    class SetupError(Exception):
        def _render_traceback_(self):
            return [str(self)]      # one sentence instead of a traceback

    def run(*command):
        return subprocess.run(command, capture_output=True, text=True)

    smi = shutil.which("nvidia-smi")
    gpus = run(smi, "-L").stdout if smi else ""
    useless = {"quantized", "vllm"}
    if "GPU 0" in gpus:
        useless.remove("quantized" if "T4" in gpus else "vllm")
    extras = [name for name in extras.split(",") if name not in useless]
    missing = []
    try:
        importlib.import_module("tinylora_lite")
    except ImportError:
        missing.append(f"tinylora_lite[{','.join(extras)}]{SOURCE}")
    try:    # PEFT refuses to load beside an older torchao, as Colab has it
        found = metadata.version("torchao").split(".")
        if (int(found[0]), int(found[1])) < (0, 16):
            missing.append("torchao>=0.16")
    except metadata.PackageNotFoundError:
        pass
    if missing:
        print("Installing", *missing, flush=True)
        pip = run(sys.executable, "-m", "pip", "install", "-q", *missing)
        importlib.invalidate_caches()
        if pip.returncode:
            lines = [line.strip() for line in pip.stderr.splitlines()]
            told = [line for line in lines
                    if line.lower().startswith(("error: ", "fatal: "))]
            told.sort(key=lambda line: "subprocess-exited" in line)
            raise SetupError(
                f"pip could not install {' '.join(missing)}"
                f" ({(told or lines or ['no message'])[0]}): connect this"
                " machine to the internet, with git and Python 3.11 or newer"
                " on it, and run this cell again."
            )
    try:
        loaded = [importlib.import_module(name)
                  for name in ("tinylora_lite", "torch", "transformers")]
    except Exception as error:
        raise SetupError(
            "tinylora_lite is installed and cannot be imported"
            f" ({str(error).strip().partition(chr(10))[0]}): restart the"
            " kernel (in Colab: Runtime, Restart session) and run this cell"
            " again."
        ) from None
    cuda = loaded[1].cuda
    print(*(f"{module.__name__} {module.__version__}" for module in loaded),
          cuda.get_device_name() if cuda.is_available() else "no GPU",
          sep=", ")


set_up(EXTRAS)'''


@cache
def source() -> str:
    """Where this version is installed from, as a requirement has it after the name and the extras.

    ``"==VERSION"`` where ``on-index`` says that the release is on the package index, else the repository at the tag.
    """
    found = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project = found["project"]
    if found["tool"]["tinylora_lite"]["on-index"]:
        return f"=={project['version']}"
    return f" @ git+{project['urls']['Repository']}@v{project['version']}"


def cell(extras: str) -> str:
    """The setup cell of a notebook that needs ``extras``, names separated by commas.

    Of ``quantized`` and ``vllm`` the cell takes what the machine has a use for: the presets ask for four bits on a T4,
    which bitsandbytes computes, and for vLLM on other GPUs.
    """
    return CELL.replace("<extras>", extras).replace("<source>", source())


def install_line(extras: str = "") -> str:
    """How a page says that the library is installed; ``extras`` are in their brackets."""
    wanted = f"tinylora_lite{extras}"
    return f'pip install "{wanted}{source()}"' if source().startswith(" ") else f"pip install {wanted}"


def extras_of(text: str) -> str:
    """The extras that a setup cell names. Raises ``ValueError`` where it names none."""
    found = re.search(r'^EXTRAS = "([\w,]+)"$', text, re.MULTILINE)
    if found is None:
        raise ValueError('a setup cell needs a line EXTRAS = "name,name"')
    return found[1]


def up_to_date() -> dict[Path, str]:
    """Every notebook and page that holds the cell or the line, and its text as it must be."""
    texts = {}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        for each in notebook["cells"]:
            if TAGS[0] in each["metadata"].get("tags", []):
                each["source"] = cell(extras_of("".join(each["source"]))).splitlines(keepends=True)
                each |= {"metadata": METADATA, "outputs": [], "execution_count": None}
        texts[path] = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    for path in (ROOT / name for name in PAGES):
        line = re.compile(r'^pip install "?tinylora_lite\b(\[[\w,]+\])?.*$', re.MULTILINE)
        texts[path] = line.sub(lambda found: install_line(found[1] or ""), path.read_text(encoding="utf-8"))
    return texts


def main() -> None:
    """Writes what is not up to date, and says so."""
    for path, text in up_to_date().items():
        if text != path.read_text(encoding="utf-8"):
            path.write_text(text, encoding="utf-8")
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
