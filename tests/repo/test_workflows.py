"""The linters of `make lint` for workflows and the citation file; they need no network."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def run(root, tool, *arguments):
    program = shutil.which(tool, path=str(Path(sys.executable).parent)) or shutil.which(tool)
    if program is None:
        pytest.skip(f"{tool} is not installed")
    command = [program, *map(str, arguments)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_zizmor(root):
    run(root, "zizmor", "--offline", ".github/workflows")


def test_workflow_schema(root):
    workflows = sorted((root / ".github" / "workflows").glob("*.yml"))
    run(root, "check-jsonschema", "--builtin-schema", "vendor.github-workflows", *workflows)


def test_citation_schema(root):
    run(root, "check-jsonschema", "--builtin-schema", "vendor.citation-file-format", "CITATION.cff")


def test_every_job_has_a_time_limit(root):
    for workflow in (root / ".github" / "workflows").glob("*.yml"):
        text = workflow.read_text(encoding="utf-8")
        assert text.count("runs-on:") == text.count("timeout-minutes:"), workflow.name
