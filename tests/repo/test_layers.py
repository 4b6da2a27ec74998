"""Imports go in one direction: the rooms in layers, and no circle anywhere, imports inside functions included."""

import os

from importlinter import api
from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports


def test_the_contracts_hold(root, monkeypatch):
    monkeypatch.chdir(root)
    assert lint_imports(cache_dir=os.devnull, no_cache=True) == EXIT_STATUS_SUCCESS


def test_every_room_has_its_layer(root):
    session = api.read_configuration(str(root / ".importlinter"))
    (layers,) = (c["layers"] for c in session["contracts_options"] if c["type"] == "layers")
    named = {room for layer in layers for room in layer.replace("|", " ").split()}
    rooms = {path.parent.name for path in (root / "tinylora_lite").glob("*/__init__.py")}
    assert named == rooms


def test_the_root_holds_packages_alone(root):
    files = {path.name for path in (root / "tinylora_lite").iterdir() if path.is_file()}
    assert files == {"__init__.py", "__init__.pyi", "__main__.py", "py.typed"}


def test_no_file_is_long(root):
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in root.glob("tinylora_lite/**/*.py")}
    assert {str(path) for path, length in lengths.items() if length > 350} == set()
