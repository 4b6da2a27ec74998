"""What a run on CPUs computes with: a dtype, threads and processes, chosen by a measurement of a second."""

from __future__ import annotations

import ctypes
import math
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.nn import functional as F

SECONDS = 0.2
"""Of each measurement."""
ROWS, WIDTH = 64, 1024
"""Of the products: as many rows as are often decoded together, and a weight as wide as those of small models."""
M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1
"""Of glibc's malloc.h."""
FASTER = 2.0
"""How many times as fast bfloat16's products must be for it to be chosen: what is no product gains nothing."""


@dataclass(frozen=True)
class Computing:
    """What a run on CPUs computes with.

    Attributes:
        dtype: of the frozen base.
        threads: of each process.
        processes: that share every batch.
        gflops: what :func:`measure` found; empty where nothing was measured.
    """

    dtype: str
    threads: int
    processes: int
    gflops: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        """One line: what was chosen, and from which rates."""
        rates = ", ".join(f"{name} {rate:.0f}" for name, rate in self.gflops.items())
        chosen = f"CPU: {self.dtype}, processes: {self.processes}, threads of each: {self.threads}"
        return f"{chosen} (GFLOP/s: {rates})" if rates else chosen


def choose(dtype: str, threads: int | str, processes: int | str, *, shares: int = 1, most: float = 1) -> Computing:
    """What is left open with ``"auto"``, by :func:`measure`.

    bfloat16 where its products are more than twice as fast as float32's, as on processors with units for it; else
    float32. There are as many processes as cores are free, since threads wait for one another after each of the many
    small products of decoding. Threads take cores that no process can have, where they are worth it.

    Args:
        dtype: of the base; what is given stays, here and below.
        threads: of each process.
        processes: that share the work.
        shares: into how many equal parts the work can be divided.
        most: how many processes the memory has room for.
    """
    if "auto" not in (dtype, threads, processes):
        return Computing(dtype, int(threads), int(processes))
    rates = measure()
    one, bfloat16, together, threaded = rates.values()
    if dtype == "auto":
        dtype = "bfloat16" if bfloat16 > FASTER * one else "float32"
    if processes == "auto":
        # A core that is busy for three quarters of the time is not free.
        free = max(1, int(min(together / one + 0.25, most)))
        processes = max(n for n in range(1, free + 1) if shares % n == 0)
    if threads == "auto":
        threads = max(1, cores() // int(processes)) if threaded > 0.75 * cores() * one else 1
    return Computing(dtype, int(threads), int(processes), rates)


def measure() -> dict[str, float]:
    """Rates of matrix products of 64 rows, GFLOP/s: on one thread in float32 and in bfloat16, and on all cores.

    Those of one thread are by its own time, whatever else the machine does; those on all cores, as many single threads
    as there are and then one product on all of them, are by the clock, since there the question is what is free.
    """
    before, count = torch.get_num_threads(), cores()
    try:
        rates = {name: _rate(getattr(torch, name), clock=time.thread_time) for name in ("float32", "bfloat16")}
        together = _rate(torch.float32, at_once=count)
        return rates | {f"{count} x float32": together, f"{count} threads": _rate(torch.float32, threads=count)}
    finally:
        torch.set_num_threads(before)


def keep_memory() -> None:
    """From now on this process keeps the memory that it frees, where the C library is glibc.

    Tensors as large as the logits of a step would otherwise come from the system anew in every step, page by page.
    """
    with suppress(AttributeError, OSError, TypeError):  # another C library, or none that can be asked
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_MAX, 0)
        library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def cores() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory() -> float:
    """Bytes of main memory, or of the container's share of it; infinite where the system does not say."""
    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf
    with suppress(OSError, ValueError):  # no control group, or "max"
        limit = min(limit, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return float(limit)


def _rate(
    dtype: torch.dtype, threads: int = 1, at_once: int = 1, clock: Callable[[], float] = time.perf_counter
) -> float:
    torch.set_num_threads(threads)  # of this thread, and of those that it starts

    def products(_: int) -> float:
        inputs, weight = torch.ones(ROWS, WIDTH, dtype=dtype), torch.ones(WIDTH, WIDTH, dtype=dtype)
        F.linear(inputs, weight)  # the first one sets up
        started, begun, done = time.perf_counter(), clock(), 0
        while time.perf_counter() - started < SECONDS:
            F.linear(inputs, weight)
            done += 1
        return done / (clock() - begun)

    with ThreadPoolExecutor(at_once) as pool:
        return sum(pool.map(products, range(at_once))) * 2 * ROWS * WIDTH**2 / 1e9
