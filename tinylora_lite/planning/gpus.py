"""GPUs: what fits on them and how fast they can be at best."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """One GPU.

    Attributes:
        name: as NVIDIA has it.
        memory: bytes that PyTorch finds on it (``torch.cuda.get_device_properties(0).total_memory``), a little less
            than the name says.
        matrix_rate: multiplications and additions per second of its matrix units in half precision, dense, accumulated
            in float32: the maker's figure, which no real matrix product reaches.
        bandwidth: bytes per second between its memory and its processors: the maker's figure.
        bfloat16: whether it multiplies bfloat16.
    """

    name: str
    memory: int
    matrix_rate: float
    bandwidth: float
    bfloat16: bool = True


def _card(name: str, gib: float, teraflops: float, gigabytes: float, bfloat16: bool = True) -> Card:
    return Card(name, int(gib * 2**30), teraflops * 1e12, gigabytes * 1e9, bfloat16)


CARDS: dict[str, Card] = {
    "t4": _card("Tesla T4", 14.56, 65, 320, bfloat16=False),
    "l4": _card("L4", 22.03, 121, 300),
    "a10g": _card("A10G", 22.06, 70, 600),
    "4090": _card("GeForce RTX 4090", 23.5, 165, 1008),
    "l40s": _card("L40S", 44.39, 362, 864),
    "a100-40gb": _card("A100 40GB", 39.39, 312, 1555),
    "a100-80gb": _card("A100 80GB", 79.15, 312, 2039),
    "h100": _card("H100 SXM 80GB", 79.10, 989, 3350),
    "h200": _card("H200 SXM", 139.80, 989, 4800),
}
"""By the name that a command line takes. Rates are those of NVIDIA's data sheets, without sparsity; memory is what
PyTorch's own out-of-memory messages name as a card's total capacity."""


def card_named(name: str) -> Card:
    """A card by its short name.

    Raises:
        ValueError: there is none of that name.
    """
    found = {"a100": "a100-80gb", "h100-80gb": "h100", "rtx4090": "4090"}.get(name.lower(), name.lower())
    if found not in CARDS:
        raise ValueError(f"no card named {name}; there are: {', '.join(CARDS)}")
    return CARDS[found]
