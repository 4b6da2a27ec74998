"""Ten thousand damaged adapter files: each loads to the very same adapter, or raises AdapterFileError."""

import random
import warnings
from collections import Counter

import pytest
import torch

import tinylora_lite as tl
from tinylora_lite.adapter.attached import adapter_of

FILES = 10_000


def flip_bit(data: bytearray, draw: random.Random) -> None:
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def set_bytes(data: bytearray, draw: random.Random) -> None:
    for _ in range(draw.choice((1, 2, 8, 64))):
        data[draw.randrange(len(data))] = draw.randrange(256)


def truncate(data: bytearray, draw: random.Random) -> None:
    del data[draw.randrange(len(data)) :]


def remove(data: bytearray, draw: random.Random) -> None:
    start = draw.randrange(len(data))
    del data[start : start + draw.choice((1, 2, 8, 100))]


def insert(data: bytearray, draw: random.Random) -> None:
    start = draw.randrange(len(data) + 1)
    data[start:start] = draw.randbytes(draw.choice((1, 2, 8, 100)))


def repeat(data: bytearray, draw: random.Random) -> None:
    start, there = draw.randrange(len(data)), draw.randrange(len(data))
    data[there:there] = data[start : start + draw.choice((1, 8, 100))]


def another_digit(data: bytearray, draw: random.Random) -> None:
    """The header's numbers and names: what a careless edit changes, and a parser forgives."""
    places = [place for place, byte in enumerate(data) if chr(byte).isalnum()]
    if places:
        data[draw.choice(places)] = ord(draw.choice("0123456789abcxyz"))


def another_length(data: bytearray, draw: random.Random) -> None:
    """The header's length, which says how much memory to ask for."""
    data[: draw.choice((1, 2, 4, 8))] = draw.randbytes(8)[: draw.choice((1, 2, 4, 8))]


MUTATIONS = (flip_bit, set_bytes, truncate, remove, insert, repeat, another_digit, another_length)


@pytest.fixture(params=[False, True], ids=["numbers", "with factors"])
def file(request, model, tmp_path):
    adapter = tl.attach(model, tl.TinyLoraConfig(n_tie=2))
    with torch.no_grad():
        adapter.vectors.normal_(generator=torch.Generator().manual_seed(0))
    path = tl.save(adapter, tmp_path / "a.tinylora", factors=request.param)
    adapter.detach()
    return path


def test_ten_thousand_damaged_files(model, file, tmp_path):
    original, draw, outcomes = file.read_bytes(), random.Random(0), Counter()
    adapter = tl.load(model, file)
    vectors, deltas = adapter.vectors.clone(), [adapter.delta(name) for name in adapter.names]
    adapter.detach()
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    path = tmp_path / "damaged.tinylora"
    for _ in range(FILES // 2):
        data = bytearray(original)
        for _ in range(draw.choice((1, 1, 1, 2, 5))):
            if data:
                draw.choice(MUTATIONS)(data, draw)
        path.write_bytes(data)
        try:
            with warnings.catch_warnings(action="error"):
                adapter = tl.load(model, path)
        except tl.AdapterFileError:
            outcomes["refused"] += 1
            assert adapter_of(model) is None
        else:
            outcomes["loaded"] += 1
            assert torch.equal(adapter.vectors, vectors)
            assert all(torch.equal(adapter.delta(n), d) for n, d in zip(adapter.names, deltas, strict=True))
            adapter.detach()
    assert sum(outcomes.values()) == FILES // 2
    assert outcomes["refused"] > 0.9 * FILES // 2
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
