"""Score a model, adapted or not, on test problems, and keep every completion.

An interrupted evaluation goes on where it stopped, if it is called again with the same --folder.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tinylora_lite as tl
from tinylora_lite.cli import shared
from tinylora_lite.cli.processes import computing

if TYPE_CHECKING:
    from tinylora_lite.experiment.settings import RunSettings

EXAMPLE = "tinylora eval nano --adapter tinylora-demo/calibrated.tinylora --task nano --compare"
SEED_HELP = "of the sampling"

ENGINES = ("transformers", "vllm", "vllm-server")
MAX_NEW_TOKENS = 2048


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``tinylora eval``."""
    add, one_or_more = parser.add_argument, shared.at_least(1)
    add("model", metavar="MODEL", help=shared.MODEL_HELP)
    add("--task", nargs="+", required=True, metavar="NAME", help="nano, gsm8k, math500 and others; several are allowed")
    add("--adapter", type=Path, metavar="FILE", help="an adapter file, or a folder with PEFT's TinyLoRA")
    add("--basis", type=Path, help=shared.BASIS_HELP)
    add("--compare", action="store_true", help="score the base on the same problems too, and compare the two")
    add("--split", choices=("test", "validation"), default="test", help="of the task (default: test)")
    add("--problems", type=one_or_more, help="how many, from the start of the split (default: all)")
    add("--samples", type=one_or_more, default=1, help="completions of each problem (default: 1)")
    add("--temperature", type=shared.at_least(0, float), help="0 is greedy (default: 0 with one sample, 1 with more)")
    add("--max-new-tokens", type=one_or_more, help=f"the length limit (default: {MAX_NEW_TOKENS}, of nano 48)")
    add("--data", metavar="FOLDER", help="where the problems are, in place of the hub")
    add("--prompt", help="how the problems are asked (default: the task's own way)")
    add("--shots", type=shared.at_least(0), default=0, help="worked training problems that each prompt shows first")
    add("--engine", choices=ENGINES, default=ENGINES[0], help="what answers (default: transformers)")
    add("--url", help="of the server, for the engine vllm-server")
    add("--gpu-memory", type=float, help="of the engine vllm only: its share of the GPU's memory (default: 0.85)")
    add("--tensor-parallel", type=one_or_more, help="of the engine vllm only: GPUs that share a model (default: 1)")
    add("--batch-size", type=one_or_more, help="completions decoded together (default: 128; with vLLM 1024)")
    add("--dtype", choices=("auto", "bfloat16", "float16", "float32"), help="of the model (default: the adapter's)")
    add("--device", help="as torch names it (default: the GPU, where there is one)")
    add("--threads", type=one_or_more, help="of a process on a CPU (default: by a measurement)")
    add("--processes", type=one_or_more, help="that share the problems on CPUs (default: by a measurement)")
    add("--revision", help="of a model on the hub: a commit, branch or tag")
    add("--folder", type=Path, help="where completions and results go (default: they are not kept)")


def run(arguments: argparse.Namespace) -> None:
    """Shows a table of the scores and the comparisons in words; or JSON."""
    a = arguments
    if a.adapter is None and (a.compare or a.basis):
        raise ValueError("--compare and --basis are of an adapter; name it with --adapter")
    if (a.url is not None) != (a.engine == "vllm-server"):
        raise ValueError("--url names the server of --engine vllm-server; give both or neither")
    if a.engine != "vllm" and (a.gpu_memory, a.tensor_parallel) != (None, None):
        raise ValueError("--gpu-memory and --tensor-parallel are of --engine vllm; a server has its own")
    if a.temperature is None:
        a.temperature = 0.0 if a.samples == 1 else 1.0
    if a.device and a.engine != "transformers":
        raise ValueError("--device is of --engine transformers; vLLM takes the GPUs that it sees")
    trained: tuple[str, int] = ("auto", 1) if a.adapter is None else shared.trained_with(a.adapter)
    runs = {name: _settings(a, name, *trained) for name in a.task}
    first, here = runs[a.task[0]], a.engine == "transformers" and a.device in (None, "cpu")
    with computing(first, a.words, shares=0, folder=a.folder) if here else contextlib.nullcontext(first) as settings:
        _run(arguments, runs, settings.dtype)


def _run(arguments: argparse.Namespace, runs: dict[str, RunSettings], dtype: str) -> None:
    from tinylora_lite.experiment.models import gguf_file, load_tokenizer
    from tinylora_lite.experiment.run import task_named
    from tinylora_lite.experiment.runner import Runner
    from tinylora_lite.files.gguf import gguf_sha256
    from tinylora_lite.utils import distributed
    from tinylora_lite.utils.files import atomic_write
    from tinylora_lite.utils.record import environment

    a = arguments
    with shared.command_progress(plain=distributed.rank() > 0) as progress:
        with shared.told_warnings():
            tasks = {name: task_named(name, settings) for name, settings in runs.items()}
            for name, task in tasks.items():
                if not getattr(task, a.split):
                    raise ValueError(f"task {name} has no {a.split} problems")
            own = a.engine == "transformers"
            options: dict[str, Any] = {"dtype": dtype, "device": a.device if own else "cpu"}
            options["weights"] = own or a.adapter is not None  # which an adapter is made from, whatever answers
            runner = Runner.open(runs[a.task[0]], load_tokenizer(a.model, a.revision), progress, **options)
            adapter = None
            if a.adapter is not None:
                progress.begin(f"attaching {a.adapter}")
                adapter = shared.attach_file(runner.base, a.adapter, a.basis)

        file = gguf_file(a.model, a.revision)
        read_from = {} if file is None else {"base_gguf": gguf_sha256(file)}

        def score(name: str, which: str) -> tl.Score:
            task, settings = tasks[name], runs[name].evaluation
            folder = None if a.folder is None else a.folder / name / which
            subject = None if runner.model is not None else {"model": a.model, "revision": a.revision or ""} | read_from
            return runner.evaluate(
                f"{name}, {which}", task, settings, split=a.split, seed=a.seed, folder=folder, subject=subject
            )

        scores: dict[str, dict[str, tl.Score]] = {name: {} for name in tasks}
        for name, found in scores.items():
            if adapter is not None and a.compare:
                with adapter.disabled():
                    found["base"] = score(name, "base")
            found["score"] = score(name, "base" if adapter is None else "adapted")
    if distributed.rank() > 0:
        return
    results: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    words: list[str] = []
    for name, found in scores.items():
        results.append({"task": name})
        for which, each in found.items():
            rows.append(_row(f"{name}, {'base' if which == 'base' or adapter is None else 'adapted'}", each))
            low, high = each.bootstrap()
            results[-1][which] = each.details() | {"bootstrap_low": low, "bootstrap_high": high}
        if "base" in found:
            compared = tl.compare(found["base"], found["score"])
            results[-1]["comparison"] = compared.summary()
            words.append(f"{name}, strict: {compared.strict}")
            words += [f"{name}, lenient: {compared.lenient}"] if compared.lenient is not None else []
    named = ("model", "revision", "engine", "split", "samples", "seed", "folder", "adapter", "temperature")
    record = {name: getattr(a, name) for name in named} | {"results": results, "environment": environment()}
    record |= read_from | {"dtype": dtype}
    if a.folder is not None:
        atomic_write(a.folder / "result.json", json.dumps(record, indent=1, default=str) + "\n")
        words.append(f"completions: {a.folder}")
    table = shared.table(rows)
    table.box = None  # the table of a comparison fits 80 columns
    shared.show(a, record, table, *words)


def _row(name: str, score: tl.Score) -> dict[str, Any]:
    """A line of the table; shares are in percent."""

    def interval(of: tl.Score | None) -> str | None:
        return None if of is None else f"{100 * of.accuracy:.1f} [{100 * of.low:.1f}, {100 * of.high:.1f}]"

    return {
        "": name,
        "strict": interval(score),
        "lenient": interval(score.lenient),
        "format": None if score.formatted is None else f"{100 * score.formatted:.1f}",
        "cut off": f"{100 * score.truncated:.1f}",
        "tokens": f"{score.tokens:.0f}",
        "n": f"{score.n}" if score.samples == 1 else f"{score.n} x {score.samples}",
    }


def _settings(arguments: argparse.Namespace, task: str, dtype: str, rank: int) -> RunSettings:
    """The command line as the settings of a run on one task."""
    from tinylora_lite import nano
    from tinylora_lite.experiment.settings import RunSettings

    def given(*names: str) -> dict[str, Any]:
        return {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}

    limit = arguments.max_new_tokens or (nano.MAX_NEW_TOKENS if task == "nano" else MAX_NEW_TOKENS)
    batch_size = arguments.batch_size or (128 if arguments.engine == "transformers" else 1024)
    values: dict[str, Any] = {"task": task, "dtype": dtype, "adapter": {"rank": rank}}
    values |= given("model", "revision", "data", "prompt", "shots", "dtype", "threads", "processes")
    values["sampler"] = {"gpu_memory": 0.85, "batch_size": batch_size}
    values["sampler"] |= given("engine", "url", "tensor_parallel", "gpu_memory")
    values["evaluation"] = given("problems", "samples", "temperature") | {"max_new_tokens": limit, "tasks": [task]}
    return RunSettings.from_dict(values)
