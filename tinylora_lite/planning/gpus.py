"""GPUs: what fits on them and how fast they can be at best."""

from __future__ import annotations

from dataclasses import dataclass

SPARE = 0.05
"""The share of a GPU that is left to CUDA's own needs and to memory in pieces too small to use."""
CONTEXT = 0.6 * 2**30
"""Bytes of CUDA's context and libraries."""


@dataclass(frozen=True)
class GPU:
    """One GPU.

    Attributes:
        name: as NVIDIA has it.
        memory: bytes that PyTorch finds on it (``torch.cuda.get_device_properties(0).total_memory``), a little less
            than the name says.
        matrix_rate: FLOPS of its matrix units in half precision, dense, accumulated in float32: the maker's figure,
            which no real matrix product reaches.
        bandwidth: bytes per second between its memory and its processors: the maker's figure.
        bfloat16: whether it multiplies bfloat16.
    """

    name: str
    memory: int
    matrix_rate: float
    bandwidth: float
    bfloat16: bool = True

    @property
    def usable(self) -> float:
        """Bytes that a run may take."""
        return self.memory * (1 - SPARE) - CONTEXT


def _gpu(name: str, gib: float, teraflops: float, gigabytes: float, bfloat16: bool = True) -> GPU:
    return GPU(name, int(gib * 2**30), teraflops * 1e12, gigabytes * 1e9, bfloat16)


GPUS: dict[str, GPU] = {
    "t4": _gpu("Tesla T4", 14.56, 65, 320, bfloat16=False),
    "l4": _gpu("L4", 22.03, 121, 300),
    "a10g": _gpu("A10G", 22.06, 70, 600),
    "4090": _gpu("GeForce RTX 4090", 23.5, 165, 1008),
    "l40s": _gpu("L40S", 44.39, 362, 864),
    "a100-40gb": _gpu("A100 40GB", 39.39, 312, 1555),
    "a100-80gb": _gpu("A100 80GB", 79.15, 312, 2039),
    "h100": _gpu("H100 SXM 80GB", 79.10, 989, 3350),
    "h200": _gpu("H200 SXM", 139.80, 989, 4800),
}
"""By the name that a command line takes. Rates are those of NVIDIA's data sheets, without sparsity; memory is what
PyTorch's own out-of-memory messages name as a GPU's total capacity."""


def gpu_named(name: str) -> GPU:
    """A GPU by its short name.

    Raises:
        ValueError: there is none of that name.
    """
    found = {"a100": "a100-80gb", "h100-80gb": "h100", "rtx4090": "4090"}.get(name.lower(), name.lower())
    if found not in GPUS:
        raise ValueError(f"no GPU named {name}; there are: {', '.join(GPUS)}")
    return GPUS[found]
