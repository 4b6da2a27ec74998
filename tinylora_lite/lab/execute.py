"""Makes the missing runs of claims, on several cores, and keeps every record as soon as it is there."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch
from transformers.utils import logging

from tinylora_lite.lab.claim import Claim
from tinylora_lite.lab.plan import jobs, missing
from tinylora_lite.lab.running import run_trials
from tinylora_lite.lab.store import Record, Store
from tinylora_lite.lab.trial import Trial


def execute(
    claims: Sequence[Claim],
    store: Store,
    *,
    workers: int | None = None,
    seconds: float | None = None,
    bases: Path | None = None,
    report: Callable[[list[Trial], list[Record], int], None] | None = None,
) -> bool:
    """Runs what the claims still need.

    Each worker is a process with one thread: models of this size are slower on more.

    Args:
        claims: what to run, in this order of preference.
        store: takes the records; what it holds is not run again.
        workers: processes; ``None`` is one for each core.
        seconds: after which no new run starts.
        bases: where calibrated bases are kept.
        report: called after each job with its trials, their records, and how many runs are known to be missing.

    Returns:
        Whether all runs of all claims are there.

    Raises:
        RuntimeError: a run failed, or its process was ended from outside. Nothing new is started then, and what else is
            running is waited for and kept.
    """
    workers = (
        workers or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else workers or os.cpu_count() or 1
    )
    deadline = None if seconds is None else time.monotonic() + seconds
    running: dict[Future[list[Record]], list[Trial]] = {}
    failed: tuple[list[Trial], Exception] | None = None
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start, (os.getpid(),)) as pool:
        try:
            while True:
                taken = {trial for trials in running.values() for trial in trials}
                queue: list[list[Trial]] = []
                for claim in claims:
                    wanted = dict.fromkeys(trial for point in claim.points for trial in missing(point, store))
                    queue += jobs(trial for trial in wanted if trial not in taken)
                    taken |= wanted.keys()
                over = failed is not None or (deadline is not None and time.monotonic() > deadline)
                while queue and len(running) < workers and not over:
                    trials = queue.pop(0)
                    running[pool.submit(run_trials, trials, bases)] = trials
                if not running:
                    if failed is not None:
                        raise RuntimeError(_reason(*failed)) from failed[1]
                    return not queue
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    trials = running.pop(future)
                    try:
                        records = future.result()
                    except Exception as error:
                        failed = failed or (trials, error)
                        continue
                    for trial, record in zip(trials, records, strict=True):
                        store.add(trial, record)
                    if report is not None:
                        left = {t for claim in claims for point in claim.points for t in missing(point, store)}
                        report(trials, records, len(left))
        except BaseException:
            processes = list((pool._processes or {}).values())  # which shutdown forgets
            pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.terminate()
            raise


def _reason(trials: list[Trial], error: Exception) -> str:
    if isinstance(error, BrokenProcessPool):
        cause = "its process was ended from outside, as happens where memory runs out; try --workers 1"
    else:
        cause = f"{type(error).__name__}: {error}"
    return f"the run {trials[0].key} failed ({cause}); all other runs that had started are kept"


def _start(parent: int) -> None:
    """A worker's first act: one thread, and an eye on the program that started it, without which its work is lost."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()  # of loading a model, once for each job

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
