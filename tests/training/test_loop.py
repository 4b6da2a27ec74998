"""One loop trains everything as the loops before it did: adapter, population, all weights, LoRA; GRPO and SFT."""

import json
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # the tests run without being a package

from loop_cases import cases  # noqa: E402

STORED = json.loads((HERE / "loop_cases.json").read_text())


def close(found, stored):
    if isinstance(stored, dict):
        assert stored.keys() <= found.keys()
        for key, value in stored.items():
            close(found[key], value)
    elif isinstance(stored, list):
        assert len(found) == len(stored)
        for one, other in zip(found, stored, strict=True):
            close(one, other)
    else:
        assert found == pytest.approx(stored, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", STORED)
def test_the_numbers_are_those_of_the_loops_before(name, tmp_path):
    close(cases(tmp_path)[name](), STORED[name])
