"""What a command computes with on CPUs, and the processes that share its work, of which the first starts the others."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tinylora_lite.experiment.settings import RunSettings
    from tinylora_lite.utils.cpu import Computing

ROWS = 16
"""Answers from which on a process of its own is worth loading a model once more."""
FILE = "cpu.json"
"""In the folder of a run or an evaluation: what it computes with. One that goes on keeps it, unless told otherwise."""


@contextlib.contextmanager
def computing(
    settings: RunSettings, words: Sequence[str], *, shares: int, folder: Path | None
) -> Iterator[RunSettings]:
    """The settings with what the CPUs compute with in place of ``"auto"``; where there is a GPU, as they are.

    Inside, the processes that share the work are joined, whoever started them.

    Args:
        settings: ``dtype``, ``threads`` and ``processes``, and which base.
        words: the command line, for processes that are started here.
        shares: into how many equal parts the work can be divided; 0 stands for any number.
        folder: where the choice is kept.
    """
    import torch

    from tinylora_lite.utils import distributed
    from tinylora_lite.utils.cpu import keep_memory

    chosen, several = None, int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several:
        join()
    elif not torch.cuda.is_available():
        chosen = _chosen(settings, shares, folder and folder / FILE)
    with started(chosen, words) if chosen else contextlib.nullcontext():
        chosen = distributed.all_gather_object(chosen)[0]
        if chosen is not None:
            keep_memory()
            torch.set_num_threads(chosen.threads)
            now = {"dtype": chosen.dtype, "threads": chosen.threads, "processes": chosen.processes}
            settings = settings.model_copy(update=now)
        yield settings


@contextlib.contextmanager
def started(how: Computing, words: Sequence[str]) -> Iterator[None]:
    """Inside, as many processes as asked for run the command of these words: this one, and others that say nothing.

    Raises:
        RuntimeError: one of the others failed; its last words say why.
    """
    if how.processes == 1:
        yield
        return
    from torch import distributed as dist

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ours = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}", "WORLD_SIZE": f"{how.processes}", "RANK": "0"}
    theirs = os.environ | ours | {"OMP_NUM_THREADS": f"{how.threads}"}
    with tempfile.TemporaryFile() as told:
        others: list[subprocess.Popen[bytes]] = []
        os.environ.update(ours)
        try:
            for rank in range(1, how.processes):
                others.append(
                    subprocess.Popen(
                        [sys.executable, "-P", "-m", "tinylora_lite", *words],
                        env=theirs | {"RANK": f"{rank}"},
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.DEVNULL,
                        stderr=told,
                    )
                )
            # In a thread, since it would wait for a process that has failed.
            joining = threading.Thread(target=join, daemon=True)
            joining.start()
            while joining.is_alive() and not any(other.poll() for other in others):
                joining.join(0.1)
            if not dist.is_initialized():
                raise RuntimeError("the processes did not come together")
            yield
            for other in others:
                other.wait()
        except RuntimeError as error:  # whoever loses another hears of a broken connection and no more
            until = time.monotonic() + 5
            for other in others:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    other.wait(timeout=max(0, until - time.monotonic()))
            code = next((other.returncode for other in others if other.returncode), None)
            if code is None:
                raise
            told.seek(0)
            lines = [line for line in told.read().decode(errors="replace").splitlines() if line.strip()]
            cause = next((line for line in lines if line.startswith("tinylora ")), lines[-1] if lines else "silent")
            if code < 0:  # by a signal
                cause = "it was ended from outside, as systems do when memory runs out"
            raise RuntimeError(f"a process ended with exit code {code} ({cause})") from error
        finally:
            for other in others:
                other.kill()
                other.wait()
            if dist.is_initialized():
                dist.destroy_process_group()
            for name in ours:
                del os.environ[name]


def join() -> None:
    """Joins the other processes; waiting for a long evaluation must not end one."""
    import torch

    if not torch.cuda.is_available():
        torch.distributed.init_process_group("gloo", timeout=timedelta(hours=12))
        return
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise ImportError('several processes need accelerate; pip install "tinylora_lite[train]" brings it') from error
    PartialState(timeout=timedelta(hours=12))


def _chosen(settings: RunSettings, shares: int, file: Path | None) -> Computing:
    """What is asked for, was kept, or is measured now, which is printed and kept."""
    import torch

    from tinylora_lite.experiment.models import is_nano, load_tokenizer
    from tinylora_lite.planning.plan import plan_run
    from tinylora_lite.planning.shapes import model_config
    from tinylora_lite.utils import cpu
    from tinylora_lite.utils.files import atomic_write

    kept = {}
    if file is not None and file.exists():
        kept = json.loads(file.read_text(encoding="utf-8"))
    elif is_nano(settings.model):  # too small to gain anything
        threads = torch.get_num_threads() if settings.processes in ("auto", 1) else 1
        kept = {"dtype": "float32", "threads": threads, "processes": 1}
    asked = {name: getattr(settings, name) for name in ("dtype", "threads", "processes")}
    asked = {name: kept.get(name, value) if value == "auto" else value for name, value in asked.items()}
    most = 1.0
    if asked["processes"] == "auto" and shares != 1:
        load_tokenizer(settings.model, settings.revision)  # whose errors say what to do about a model that is not there
        config = model_config(settings.model, settings.revision)
        with contextlib.suppress(AttributeError, ValueError):  # of a shape that is not planned: one process
            peaks = plan_run(settings.with_dtype("float32"), "cpu", config=config).peaks
            most = cpu.memory() / max(size for phase, size in peaks.items() if shares or phase == "evaluating")
    if not shares and settings.evaluation.problems is not None:
        most = min(most, settings.evaluation.problems * settings.evaluation.samples / ROWS)
    chosen = cpu.choose(**asked, shares=shares, most=most)
    if chosen.gflops:
        print(chosen, file=sys.stderr)
    elif "gflops" in kept:
        chosen = replace(chosen, gflops=kept["gflops"])
    if chosen.gflops and file is not None:
        atomic_write(file, json.dumps(asdict(chosen), indent=1) + "\n")
    return chosen
