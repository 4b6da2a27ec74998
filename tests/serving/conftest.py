"""What the tests with vLLM share: how its Python is run."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
QUIET = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_WAIT_POLICY": "passive",
    "PYTHONPATH": str(ROOT),
    "VLLM_LOGGING_LEVEL": "WARNING",
}


@pytest.fixture(scope="session")
def vllm_python():
    """Runs a script beside the tests with the Python that has vLLM: name and arguments; it must succeed."""

    def run(script: str, *arguments: str | Path, **environment: str) -> None:
        command = [os.environ["VLLM_PYTHON"], str(Path(__file__).with_name(script)), *map(str, arguments)]
        settings = os.environ | QUIET | environment
        done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]

    return run
