"""What is installed: one version, lower bounds, a complete lock, a wheel of the library alone."""

import re
import subprocess
import sys
import zipfile

import pytest


def requirement_name(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement).group().lower().replace("_", "-")


@pytest.fixture(scope="module")
def lock(root) -> dict[str, str]:
    lines = (root / "requirements.txt").read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9.-]+==[\w.+]+( ; .+)?", line) for line in lines)
    return dict(line.split(" ;")[0].split("==") for line in lines)


def test_one_version(texts, project):
    version = project["version"]
    assert re.search(rf"^version: {re.escape(version)}$", texts["CITATION.cff"], re.MULTILINE)
    assert f"## [{version}]" in texts["CHANGELOG.md"]
    assert __import__("tinylora_lite").__version__ == version


def test_lower_bounds_only(project):
    extras = project["optional-dependencies"]
    for requirement in sum(extras.values(), project["dependencies"]):
        if requirement_name(requirement) != "jupyter-book":
            assert re.fullmatch(r"[\w.-]+>=[\w.]+", requirement)


def test_the_lock_holds_all_that_book_and_tests_need(lock, project):
    extras = project["optional-dependencies"]
    wanted = sum((extras[name] for name in ("book", "dev", "gguf", "lab", "peft", "train")), project["dependencies"])
    assert {requirement_name(each) for each in wanted} <= set(lock)


def test_the_lock_leaves_cuda_to_the_machine(lock):
    assert [name for name in lock if name.startswith(("nvidia", "triton", "cuda"))] == []


def test_the_wheel_holds_the_library_and_nothing_else(root, tracked, tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=root, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0].split("-")[0] for name in names} == {"tinylora_lite"}
    files = [path.relative_to(root).as_posix() for path in tracked]
    assert {name for name in files if name.startswith("tinylora_lite/")} <= names
    assert "tinylora_lite/py.typed" in names, "without it type checkers ignore the library's annotations"
