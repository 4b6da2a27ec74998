"""Score a model, adapted or not, on test problems, and keep every completion.

What was interrupted goes on where it stopped, when it is called again with the same --folder.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from tinylora_lite import nano
from tinylora_lite.adapter.adapter import TinyLoraAdapter
from tinylora_lite.cli import bases
from tinylora_lite.evaluation.compare import Comparison, compare
from tinylora_lite.evaluation.evaluate import evaluate
from tinylora_lite.evaluation.score import Score
from tinylora_lite.experiment.models import is_nano, load_model, load_tokenizer
from tinylora_lite.files.adapter_file import load
from tinylora_lite.files.file_format import read_file
from tinylora_lite.files.peft import import_peft
from tinylora_lite.sampling.rollouts import Sampler
from tinylora_lite.tasks.task import Task
from tinylora_lite.utils.progress import progress_bar
from tinylora_lite.utils.record import atomic_write, environment
from tinylora_lite.view.progress import PlainProgress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HELP = "score a model and an adapter on test problems"
EXAMPLE = "tinylora eval nano --adapter tinylora-demo/calibrated.tinylora --task nano --compare"
SEED_HELP = "of the sampling"

ENGINES = ("transformers", "vllm", "vllm-server")
BATCH_SIZES = {"transformers": 128, "vllm": 1024, "vllm-server": 1024}
MAX_NEW_TOKENS = 2048
GPU_MEMORY = 0.85
LINES = 10
"""How many lines a log gets about the completions of one task, at most."""


@dataclass(frozen=True)
class Result:
    """The scores on one task."""

    task: str
    score: Score
    base: Score | None

    @property
    def comparison(self) -> Comparison | None:
        """Base and adapted on the same problems, where both were scored."""
        return None if self.base is None else compare(self.base, self.score)

    def summary(self) -> dict[str, Any]:
        """What the command prints as JSON."""
        scores: dict[str, Any] = {"task": self.task, "score": _details(self.score)}
        if self.base is not None and self.comparison is not None:
            scores |= {"base": _details(self.base), "comparison": self.comparison.summary()}
        return scores


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``tinylora eval``."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="nano, the folder of a transformers checkpoint, or its name on the hub")
    add("--task", nargs="+", required=True, metavar="NAME", help="nano, gsm8k, math500 and others; several are allowed")
    add("--adapter", type=Path, metavar="FILE", help="an adapter file, or a folder with PEFT's TinyLoRA")
    add("--basis", type=Path, help="of a calibrated adapter (default: beside its file, or in the package)")
    add("--compare", action="store_true", help="score the base on the same problems too, and compare the two")
    add("--split", choices=("test", "validation"), default="test", help="of the task (default: test)")
    add("--problems", type=int, help="how many, from the start of the split (default: all)")
    add("--samples", type=int, default=1, help="completions of each problem (default: 1)")
    add("--temperature", type=float, help="0 is greedy (default: 0 with one sample, 1 with more)")
    add("--max-new-tokens", type=int, help=f"the length limit (default: {MAX_NEW_TOKENS}; nano task: enough for it)")
    add("--data", type=Path, metavar="FOLDER", help="where the problems are, in place of the hub")
    add("--prompt", help="how the problems are asked (default: the task's own way)")
    add("--engine", choices=ENGINES, default="transformers", help="what answers (default: transformers)")
    add("--url", help="of the server, for the engine vllm-server")
    add("--gpu-memory", type=float, help="vLLM's share of the GPU's memory (default: 0.85)")
    add("--tensor-parallel", type=int, help="GPUs that vLLM splits the model over (default: 1)")
    add("--batch-size", type=int, help="completions decoded together (default: 128; with vLLM 1024)")
    add("--dtype", choices=("auto", "bfloat16", "float16", "float32"), help="of the model (default: the adapter's)")
    add("--device", help="as torch names it (default: the GPU, where there is one)")
    add("--revision", help="of a model on the hub: a commit, branch or tag")
    add("--folder", type=Path, help="where completions and results go (default: they are not kept)")


def run(arguments: argparse.Namespace) -> None:
    """Shows a table of the scores and the comparisons in words; or JSON."""
    _check(arguments)
    progress = PlainProgress()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    with ExitStack() as stack:
        with bases.told_warnings():
            tasks = {name: _task(name, arguments) for name in dict.fromkeys(arguments.task)}
            progress.begin(f"loading {arguments.model}")
            bench = _Bench(arguments, progress, stack)
        results = [bench.result(name, task) for name, task in tasks.items()]
    named = ("model", "revision", "engine", "split", "samples", "seed", "folder", "adapter")
    record = {name: _plain(getattr(arguments, name)) for name in named} | {
        "temperature": _temperature(arguments),
        "results": [result.summary() for result in results],
        "environment": environment(),
    }
    if arguments.folder is not None:
        atomic_write(arguments.folder / "result.json", json.dumps(record, indent=1) + "\n")
    if arguments.json:
        print(json.dumps(record))
        return
    Console().print(_table(results))
    for result in results:
        compared = result.comparison
        for name in ("strict", "lenient") if compared is not None else ():
            difference = getattr(compared, name)
            if difference is not None:
                print(f"{result.task}, {name}: {difference}")
    if arguments.folder is not None:
        print(f"completions: {arguments.folder}")


class _Bench:
    """The model, the adapter on it, and what answers; loaded once for all tasks."""

    def __init__(self, arguments: argparse.Namespace, progress: PlainProgress, stack: ExitStack) -> None:
        self.arguments, self.progress = arguments, progress
        self.model: PreTrainedModel | None = None
        self.adapter: TinyLoraAdapter | None = None
        own = arguments.engine == "transformers"
        if own or arguments.adapter is not None:  # an adapter is decomposed from the weights, whoever answers
            device = arguments.device if own else "cpu"
            dtype = arguments.dtype or _dtype(arguments.adapter)
            self.model, self.tokenizer = load_model(
                arguments.model, dtype=dtype, device=device, revision=arguments.revision
            )
        else:
            self.tokenizer = load_tokenizer(arguments.model, arguments.revision)
        if arguments.adapter is not None and self.model is not None:
            progress.begin(f"attaching {arguments.adapter}")
            self.adapter = _attach(self.model, arguments.adapter, arguments.basis)
        self.sampler = None if own else _engine(arguments, self.tokenizer, (self.model, self.adapter), stack)

    def result(self, name: str, task: Task) -> Result:
        """Scores one task: the base first, where it is asked for."""
        base = None
        if self.arguments.compare and self.adapter is not None:
            with self.adapter.disabled():
                base = self._score(name, task, "base")
        return Result(name, self._score(name, task, "base" if self.adapter is None else "adapted"), base)

    def _score(self, name: str, task: Task, which: str) -> Score:
        a = self.arguments
        examples = getattr(task, a.split)[: a.problems]
        total = len(examples) * a.samples
        self.progress.begin(f"{name}, {which}: {len(examples):,} problems")
        with progress_bar(f"{name}, {which}", total) as advance:
            tell = _teller(self.progress, advance)
            score = evaluate(
                self.model,
                self.tokenizer,
                task,
                split=a.split,
                problems=a.problems,
                samples=a.samples,
                temperature=_temperature(a),
                max_new_tokens=_max_new_tokens(a, name),
                batch_size=a.batch_size or BATCH_SIZES[a.engine],
                seed=a.seed,
                progress=tell,
                sampler=self.sampler,
                folder=None if a.folder is None else a.folder / name / which,
                subject=None if self.model is not None else {"model": a.model, "revision": a.revision or ""},
            )
        self.progress.scored(f"{name}, {which}", score)
        return score


def _teller(progress: PlainProgress, advance: Callable[[str], None]) -> Callable[[int, int], None]:
    """Moves the bar on a terminal, and writes some lines where there is none."""
    told = 0

    def tell(done: int, total: int) -> None:
        nonlocal told
        for _ in range(done - told):
            advance("")
        if not sys.stderr.isatty() and done * LINES // total > told * LINES // total and done < total:
            progress.begin(f"  {done:,} of {total:,}")
        told = done

    return tell


def _check(arguments: argparse.Namespace) -> None:
    """Raises ``ValueError`` where options do not go together, before anything is loaded."""
    a = arguments
    if a.compare and a.adapter is None:
        raise ValueError("--compare is of the base and an adapter; name the adapter with --adapter")
    if a.basis is not None and a.adapter is None:
        raise ValueError("--basis belongs to an adapter; name it with --adapter")
    if (a.url is not None) != (a.engine == "vllm-server"):
        raise ValueError("--url names the server of --engine vllm-server; give both or neither")
    if a.engine != "vllm" and (a.gpu_memory is not None or a.tensor_parallel is not None):
        raise ValueError("--gpu-memory and --tensor-parallel are of --engine vllm; a server has its own")
    for name in ("problems", "samples", "max_new_tokens", "batch_size", "tensor_parallel"):
        value = getattr(a, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    if a.temperature is not None and not 0 <= a.temperature < math.inf:
        raise ValueError(f"--temperature must be at least 0, not {a.temperature}")
    if a.adapter is not None and not a.adapter.exists():
        raise FileNotFoundError(f"there is no adapter at {a.adapter}")


def _task(name: str, arguments: argparse.Namespace) -> Task:
    if name == "nano":
        task = nano.task()
    else:
        from tinylora_lite.tasks.datasets import load_task  # the data may need extras

        task = load_task(name, data=arguments.data, prompt=arguments.prompt)
    if not getattr(task, arguments.split):
        raise ValueError(f"task {name} has no {arguments.split} problems")
    return task


def _dtype(adapter: Path | None) -> str:
    """The dtype in which an adapter was trained, since its file fits no narrower one; the checkpoint's without one."""
    if adapter is None or adapter.is_dir():
        return "auto"
    trained_in = str(read_file(adapter)[0].get("base_dtype"))
    return trained_in if trained_in in bases.TORCH_DTYPES else "auto"


def _attach(model: PreTrainedModel, file: Path, basis: Path | None) -> TinyLoraAdapter:
    return import_peft(model, file) if file.is_dir() else load(model, file, basis)


def _engine(
    arguments: argparse.Namespace,
    tokenizer: PreTrainedTokenizerBase,
    bench: tuple[PreTrainedModel | None, TinyLoraAdapter | None],
    stack: ExitStack,
) -> Sampler:
    a, (model, adapter) = arguments, bench
    if a.engine == "vllm-server":
        from tinylora_lite.sampling.vllm_server import VllmServerSampler

        return VllmServerSampler(a.url, tokenizer)
    from tinylora_lite.sampling.vllm import VllmSampler

    weights: str | Path = a.model
    if is_nano(a.model):  # its folder holds a basis too, which vLLM would take for weights
        weights = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tinylora-")))
        (model or nano.load()[0]).save_pretrained(weights)
    return VllmSampler(
        weights,
        tokenizer,
        gpu_memory=a.gpu_memory or GPU_MEMORY,
        tensor_parallel=a.tensor_parallel or 1,
        dtype=a.dtype or _dtype(a.adapter),
        max_lora_rank=1 if adapter is None else adapter.config.rank,
        **({} if a.revision is None else {"revision": a.revision}),
    )


def _temperature(arguments: argparse.Namespace) -> float:
    if arguments.temperature is not None:
        return float(arguments.temperature)
    return 0.0 if arguments.samples == 1 else 1.0


def _max_new_tokens(arguments: argparse.Namespace, task: str) -> int:
    return int(arguments.max_new_tokens or (nano.MAX_NEW_TOKENS if task == "nano" else MAX_NEW_TOKENS))


def _details(score: Score) -> dict[str, Any]:
    low, high = score.bootstrap()
    return score.details() | {"bootstrap_low": low, "bootstrap_high": high}


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _table(results: list[Result]) -> Table:
    """A row for each score, in percent."""
    table = Table(box=None, padding=(0, 1, 0, 0))
    for title in ("", "strict", "lenient", "format", "cut off", "tokens", "n"):
        table.add_column(title, justify="right" if title else "left", no_wrap=True)
    for result in results:
        scored = {"": result.score} if result.base is None else {", base": result.base, ", adapted": result.score}
        for which, score in scored.items():
            table.add_row(
                result.task + which,
                _percents(score.accuracy, score.low, score.high),
                "" if score.lenient is None else _percents(*score.lenient),
                "" if score.formatted is None else f"{100 * score.formatted:.1f}",
                "" if score.truncated is None else f"{100 * score.truncated:.1f}",
                "" if score.tokens is None else f"{score.tokens:.0f}",
                f"{score.n}" if score.samples == 1 else f"{score.n} x {score.samples}",
            )
    return table


def _percents(accuracy: float, low: float, high: float) -> str:
    return f"{100 * accuracy:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
