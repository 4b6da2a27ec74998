"""The full-size benchmark does what it says, on a shape that a CPU can take."""

import pytest
import torch

pytest.importorskip("peft")

from benchmarks import full_size


def test_the_step_of_a_small_shape():
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape |= {"intermediate_size": 96, "vocab_size": 300, "tie_word_embeddings": False}
    sizes = {"rows": 4, "prompt": 6, "completion": 10, "micro_batch": 2, "matrix": 64}
    found = full_size.measure(shape, torch.device("cpu"), torch.float32, **sizes)
    assert found["setup_seconds"] > 0
    assert len(found["steps"]) == 6
    block = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96
    for step in found["steps"].values():
        assert len(step["seconds"]) == full_size.ROUNDS
        flops = step["tokens_per_second"] * 4 * (2 * block + 64 * 300)
        assert step["share_of_matrix_rate"] == pytest.approx(flops / found["matrix_tflops"] / 1e12)
