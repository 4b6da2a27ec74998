"""GPUs: what fits on them and how fast they can be at best. And the CPU of this machine, of which memory is planned."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class GPU:
    """One GPU; its rates are the maker's figures.

    Attributes:
        name: as NVIDIA has it.
        memory: bytes that PyTorch finds on it (``torch.cuda.get_device_properties(0).total_memory``), a little less
            than the name says.
        matrix_rate: FLOPS of its matrix units in half precision, dense, accumulated in float32; 0: not known.
        bandwidth: bytes per second between its memory and its processors.
        bfloat16: whether it multiplies bfloat16.
    """

    name: str
    memory: float
    matrix_rate: float
    bandwidth: float
    bfloat16: bool = True

    @property
    def usable(self) -> float:
        """Bytes that a run may take, without CUDA's context and libraries and what is in pieces too small to use."""
        return 0.95 * self.memory - 0.6 * GIB


GPUS: dict[str, GPU] = {
    "t4": GPU("Tesla T4", int(14.56 * GIB), 65e12, 320e9, bfloat16=False),
    "l4": GPU("L4", int(22.03 * GIB), 121e12, 300e9),
    "a10g": GPU("A10G", int(22.06 * GIB), 70e12, 600e9),
    "4090": GPU("GeForce RTX 4090", int(23.5 * GIB), 165e12, 1008e9),
    "l40s": GPU("L40S", int(44.39 * GIB), 362e12, 864e9),
    "a100-40gb": GPU("A100 40GB", int(39.39 * GIB), 312e12, 1555e9),
    "a100-80gb": GPU("A100 80GB", int(79.15 * GIB), 312e12, 2039e9),
    "h100": GPU("H100 SXM 80GB", int(79.10 * GIB), 989e12, 3350e9),
    "h200": GPU("H200 SXM", int(139.80 * GIB), 989e12, 4800e9),
}
"""By the name that a command line takes. Rates are those of NVIDIA's data sheets, without sparsity; memory is what
PyTorch's own out-of-memory messages name as a GPU's total capacity."""


def this_cpu() -> GPU:
    """The CPU of this machine and its memory, which is unknown, and infinite, on Windows.

    What it computes in a second depends on its cores and on what else they do, so no time is planned.
    """
    from tinylora_lite.utils.cpu import memory  # and with it torch, which takes a second

    return GPU("CPU", memory(), matrix_rate=0.0, bandwidth=0.0)
