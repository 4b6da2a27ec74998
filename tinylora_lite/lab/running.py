"""Runs trials: those that can share a batch as one population, others one by one, on several cores."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.utils import logging

from tinylora_lite.adapter.adapter import TinyLoraAdapter, attach
from tinylora_lite.adapter.batched import Population, attach_population
from tinylora_lite.adapter.weights import base_fingerprint
from tinylora_lite.evaluation.evaluate import evaluate, evaluate_population
from tinylora_lite.evaluation.score import Score
from tinylora_lite.lab.baselines import added_vector, favour_one_logit, search_v, train_added
from tinylora_lite.lab.bases import config_of
from tinylora_lite.lab.claim import Claim
from tinylora_lite.lab.directions import factors_along
from tinylora_lite.lab.plan import jobs, missing
from tinylora_lite.lab.real import kept, load_base
from tinylora_lite.lab.scoring import answers, scorings, styles
from tinylora_lite.lab.store import Record, Store
from tinylora_lite.lab.tasks import task_of
from tinylora_lite.lab.trial import REAL, Trial, settings_of
from tinylora_lite.planning.counting import count_parameters
from tinylora_lite.training.evolution import train_es
from tinylora_lite.training.grpo import GRPO
from tinylora_lite.training.loop import Objective, fit
from tinylora_lite.training.lora_baseline import train_lora
from tinylora_lite.training.sft import SFT
from tinylora_lite.utils.record import Run, environment, short_hash

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

KEPT = 210
"""A record holds v of up to so many parameters."""
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def execute(
    claims: Sequence[Claim],
    store: Store,
    *,
    workers: int | None = None,
    seconds: float | None = None,
    report: Callable[[list[Trial], list[Record], int], None] | None = None,
) -> bool:
    """Runs what the claims still need and keeps each record as soon as it is made.

    Each worker is a process with one thread: models of this size are slower on more.

    Args:
        claims: what to run, in this order of preference.
        store: takes the records; what it holds is not run again.
        workers: processes; ``None`` is one for each core.
        seconds: after which no new run starts.
        report: called after each job with its trials, their records, and how many runs are known to be missing.

    Returns:
        Whether all runs of all claims are there.

    Raises:
        RuntimeError: a run failed, or its process was ended from outside. No new run starts then; those that are
            running are waited for and kept.
    """
    workers = workers or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()) or 1
    deadline = None if seconds is None else time.monotonic() + seconds
    running: dict[Future[list[Record]], list[Trial]] = {}
    failed: tuple[list[Trial], Exception] | None = None

    def needed(claim: Claim) -> dict[Trial, None]:
        return dict.fromkeys(trial for point in claim.points for trial in missing(point, store))

    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start, (os.getpid(),)) as pool:
        try:
            while True:
                taken = {trial for trials in running.values() for trial in trials}
                queue: list[list[Trial]] = []
                for wanted in map(needed, claims):
                    queue += jobs(trial for trial in wanted if trial not in taken)
                    taken |= wanted.keys()
                over = failed is not None or (deadline is not None and time.monotonic() > deadline)
                while queue and len(running) < workers and not over:
                    trials = queue.pop(0)
                    running[pool.submit(run_trials, trials)] = trials
                if not running:
                    if failed is None:
                        return not queue
                    (first, *_), error = failed
                    cause = f"the run {first.key} failed ({type(error).__name__}: {error})"
                    raise RuntimeError(f"{cause}; all other runs that had started are kept") from error
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
                        report(trials, records, len({trial for claim in claims for trial in needed(claim)}))
        except BaseException:
            processes = list((pool._processes or {}).values())  # shutdown forgets them
            pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.terminate()
            raise


def _start(parent: int) -> None:
    """Prepares a worker: one thread, and an end when the program that started it ends."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()  # of loading a model, once for each job

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_trials(trials: Sequence[Trial]) -> list[Record]:
    """Runs a trial, or several that may share a batch (:meth:`Trial.batch`); a record for each, without its settings.

    Raises ``ValueError`` for trials that cannot share a batch, and for settings that make no sense together.
    """
    started, cpu = time.perf_counter(), time.process_time()
    first = trials[0]
    if len(trials) > 1 and (first.batch() is None or len({trial.batch() for trial in trials}) > 1):
        raise ValueError("these trials differ in more than the adapters of a population may; run them one by one")
    results = [_alone(first)] if first.batch() is None else _together(trials)
    about = {
        "seconds": (time.perf_counter() - started) / len(trials),
        "cpu_seconds": (time.process_time() - cpu) / len(trials),
        "population": len(trials),
        "base": base_fingerprint(load_base(first.base)[0]),
        "environment": _environment(),
    }
    if first.base in REAL:
        about["file_sha256"] = REAL[first.base]
    return [result | about for result in results]


def train(
    trials: Sequence[Trial],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    adapter: Population | TinyLoraAdapter | None,
    on_step: Callable[[list[Run]], None] | None = None,
    folder: Path | None = None,
) -> list[Run]:
    """Trains by GRPO or SFT: a population with an adapter for each trial, one adapter, or all weights."""
    first, settings = trials[0], [settings_of(trial) for trial in trials]
    objective: type[Objective[Any]] = GRPO if first.method == "grpo" else SFT
    task = task_of(first.trained_on or first.task, first.base)
    return fit(objective(model, tokenizer, adapter, task, settings), folder=folder, on_step=on_step, progress=False)


def _together(trials: Sequence[Trial]) -> list[Record]:
    first = trials[0]
    model, tokenizer = load_base(first.base)
    factors = factors_along(model, tokenizer, first) if first.directions != "leading" else None
    population = attach_population(model, list(map(config_of, trials)), factors=factors)

    def rounded(_: list[Run]) -> None:
        """As if v were kept in a narrower dtype."""
        for v in population.vectors:
            v.data.copy_(v.data.to(PRECISIONS[first.precision]))

    try:
        runs = train(trials, model, tokenizer, population, rounded if first.precision in PRECISIONS else None)
        # All answer with the same random numbers: a score must not depend on which other trials are in the batch.
        ways = scorings(replace(first, seed=0))
        scores = {n: evaluate_population(model, tokenizer, population=population, **how) for n, how in ways}
    except FloatingPointError:
        # The parameters of one trial diverged; the others are run again without it.
        return [_diverged(first)] if len(trials) == 1 else [_together([trial])[0] for trial in trials]
    return [
        _record(run, v.detach(), {name: found[k] for name, found in scores.items()})
        for k, (run, v) in enumerate(zip(runs, population.vectors, strict=True))
    ]


def _alone(trial: Trial) -> Record:
    model, tokenizer = load_base(trial.base)
    folder = kept("runs") / trial.base / short_hash(trial.training().key) if trial.base in REAL else None
    task = task_of(trial.trained_on or trial.task, trial.base)
    run, v = Run(trial.method, {"seed": trial.seed}, trial.numbers, 0, task.name), torch.zeros(0)
    try:
        if trial.method in ("noise", "es", "search"):
            config = config_of(trial)
            if trial.method == "es":
                run, v = train_es(model, tokenizer, config, task, settings_of(trial), progress=False)
            adapter = attach(model, config)
            if trial.method == "noise":
                v = torch.randn(adapter.vectors.shape, generator=torch.Generator().manual_seed(trial.seed))
                v, run.parameters = v * (trial.learning_rate / v.norm()), adapter.num_parameters
            elif trial.method == "search":
                run, v = search_v(model, tokenizer, adapter, task, settings_of(trial))
            with torch.no_grad():
                adapter.vectors.copy_(v)
        elif trial.numbers == "LoRA":
            run = train_lora(model, tokenizer, task, settings_of(trial), rank=trial.rank, folder=folder)
        elif trial.method == "one logit":
            run, v = favour_one_logit(model, tokenizer, task, settings_of(trial))
        elif trial.numbers in ("steering vector", "logits"):
            run = train_added(model, tokenizer, task, settings_of(trial), trial.numbers, folder)
        elif trial.method != "none":
            own = None if trial.numbers == "all weights" else attach(model, config_of(trial))
            (run,) = train([trial], model, tokenizer, own, folder=folder)
            v = v if own is None else own.vectors.detach()
        scores = {
            name: evaluate(model, tokenizer, folder=folder and folder / short_hash(trial.key) / name, **how)
            for name, how in scorings(trial)
        }
    except FloatingPointError:
        return _diverged(trial)
    record = _record(run, v, scores) | (styles(scores["sampled"]) if trial.samples > 1 else {})
    if trial.base in REAL:
        record["steps"] = {name: [row[name] for row in run.steps] for name in (run.steps or [{}])[0] if name != "step"}
        if trial.split == "test":
            record["answers"] = {name: answers(score) for name, score in scores.items()}
    return record


def _diverged(trial: Trial) -> Record:
    """The record of a run that ended in NaN: no answer of such a model is right."""
    model, _ = load_base(trial.base)
    if trial.numbers in ("steering vector", "logits"):
        parameters = 1 if trial.method == "one logit" else added_vector(model, trial.numbers).numel()
    elif trial.numbers in ("all weights", "LoRA"):
        parameters = count_parameters(model, "full" if trial.numbers == "all weights" else "lora", rank=trial.rank)
    else:
        parameters = attach(model, config_of(trial)).num_parameters
    run = Run(trial.method, {}, trial.numbers, parameters, trial.task)
    if trial.method in ("grpo", "es", "search"):
        run.steps = [{"reward": 0.0}] * trial.steps
    nothing = {"accuracy": 0.0, "low": 0.0, "high": 0.0, "n": 0, "samples": 1, "lenient": 0.0}
    scores = {name: nothing for name, _ in scorings(trial)}
    return _record(run, torch.zeros(0), {}) | {"scores": scores, "diverged": True}


def _record(run: Run, v: Tensor, scores: dict[str, Score]) -> Record:
    sampled = run.steps if run.method in ("grpo", "es", "search") else []
    return {
        "parameters": run.parameters,
        "scores": {name: score.details() for name, score in scores.items()},
        "curve": [round(row["reward"], 4) for row in sampled],
        "lengths": [round(row.get("length", 0.0), 2) for row in sampled],
        "loss": [round(row["loss"], 4) for row in run.steps] if run.method == "sft" else [],
        "tokens": sum(row.get("length", 0.0) for row in run.steps),
        "training_seconds": run.seconds,
        "norm": run.steps[-1].get("norm", 0.0) if run.steps else float(v.norm()),
        "vectors": v.flatten().tolist() if v.numel() <= KEPT else [],
    }


@cache
def _environment() -> dict[str, str]:
    """Versions and machine, and the commit where the library runs from a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    git = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return environment() | ({"commit": git.stdout.strip()} if git.returncode == 0 else {})
