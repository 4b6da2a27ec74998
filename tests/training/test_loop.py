"""One loop trains everything as the loops before it did: adapter, population, all weights, LoRA; GRPO and SFT."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import tinylora_lite as tl

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # the tests run without being a package

from loop_cases import QUICK, WORKED, cases, one  # noqa: E402

STORED = json.loads((HERE / "loop_cases.json").read_text())


def close(found, stored):
    if isinstance(stored, dict):
        assert stored.keys() <= found.keys()
        for key, value in stored.items():
            if key.startswith("logprob_diff"):  # of sampler and trainer: rounding, which is another for other rows
                assert max(found[key]) < 1e-5
            else:
                close(found[key], value)
    elif isinstance(stored, list):
        assert len(found) == len(stored)
        for one, other in zip(found, stored, strict=True):
            close(one, other)
    else:
        assert found == pytest.approx(stored, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", STORED)
def test_the_numbers_are_those_of_the_loops_before(name):
    close(cases()[name](), STORED[name])


@pytest.mark.parametrize(("train", "settings"), [(tl.train_grpo, QUICK), (tl.train_sft, WORKED)])
def test_a_resumed_run_is_an_uninterrupted_one_to_the_last_bit(train, settings, tmp_path):
    one(train, replace(settings, steps=2), folder=tmp_path)
    assert one(train, settings, folder=tmp_path) == one(train, settings)
