"""The register of runs: one public record for each, checked before it is kept.

A :class:`~tinylora_lite.Run` is what training leaves behind. A :class:`Result` is what others may rely on: the run
and what it was measured against, the untouched base on the same problems above all. ``book/results/runs`` holds one
file for each; :mod:`tinylora_lite.book.register_table` puts them beside what was published.

``python -m tinylora_lite.book.runs make FOLDER --sent-by NAME`` makes the record of what ``tinylora train`` left in a
folder (:mod:`tinylora_lite.book.submission`), ``check FILE`` checks one, and ``table`` prints the tables.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinylora_lite.book.register_checks import check, fields_of

if TYPE_CHECKING:
    from tinylora_lite.evaluation.score import Score
    from tinylora_lite.utils.record import Run

_PACKAGED = Path(__file__).parents[1] / "results"
RESULTS = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[2] / "book" / "results"
"""Where results lie: beside the book in a checkout, inside the package where it was installed from a wheel."""

RUNS = RESULTS / "runs"
"""The register: one file for each run."""


@dataclass(frozen=True)
class Measured:
    """A task that base and adapted model were both scored on, by the same reward on the same problems.

    Attributes:
        task: the task's name, as ``load_task`` has it.
        temperature: of sampling; 0 is greedy.
        base: the untouched base's score (:meth:`~tinylora_lite.Score.details`): accuracy by the strict reward,
            low, high, n, samples, and where there are any lenient with its interval, formatted, truncated, tokens.
        adapted: the same of the trained model.
        comparison: the paired comparison of the two (:meth:`~tinylora_lite.Comparison.summary`).
    """

    task: str
    temperature: float
    base: dict[str, float]
    adapted: dict[str, float]
    comparison: dict[str, Any]


def measured(task: str, base: Score, adapted: Score, *, temperature: float) -> Measured:
    """Two scores as the register keeps them, compared problem by problem.

    Args:
        task: the task's name.
        base: what ``evaluate`` returned for the untouched base.
        adapted: and for the trained model, on the same problems.
        temperature: with which both were sampled; 0 is greedy.

    Raises:
        ValueError: the scores are of different problems.
    """
    from tinylora_lite.evaluation.compare import compare

    compared = compare(base, adapted).summary()
    return Measured(task, temperature, base.details(), adapted.details(), compared)


@dataclass(frozen=True)
class Result:
    """The public record of a run.

    Attributes:
        model: the base's name on the hub, or of a checkpoint of one's own.
        revision: the commit of the hub, 40 hexadecimal digits; ``"local"`` for a checkpoint of one's own.
        base: SHA-256 of its weights (:func:`~tinylora_lite.adapter.weights.base_fingerprint`).
        task: what it was trained on.
        prompt: how a problem was put: the template and the system message, in words or as they are.
        method: ``"grpo"`` or ``"sft"``.
        adapter: the adapter in words.
        parameters: how many numbers trained.
        bits: that they take as they were scored: 32 for each in float32, 16 in bfloat16.
        basis_bits: of calibrated directions, which were learned too; 0 for random ones.
        settings: of training, the seed among them.
        seed: of training.
        scores: one for each task and temperature.
        curve: the training in short: ``steps``, and the mean reward of the ``first`` and the ``last`` tenth of them
            where there were rewards.
        seconds: of training, and of the evaluations during it.
        hardware: what it ran on.
        versions: of what it ran with.
        library: the version of tinylora_lite.
        commit: of tinylora_lite, 40 hexadecimal digits; empty for an installed release.
        sent_by: who answers for it.
        notes: whatever a reader must know: an interruption, a deviation.
    """

    model: str
    revision: str
    base: str
    task: str
    prompt: str
    method: str
    adapter: str
    parameters: int
    bits: int
    settings: dict[str, Any]
    seed: int
    scores: tuple[Measured, ...]
    curve: dict[str, float]
    seconds: float
    hardware: str
    versions: dict[str, str]
    library: str
    commit: str
    sent_by: str
    basis_bits: int = 0
    notes: str = ""

    def __post_init__(self) -> None:
        check(self)

    @property
    def name(self) -> str:
        """Model, task, numbers and seed: what its file is called.

        A second run of the same four takes a name of its own.
        """
        words = (self.model.rpartition("/")[2], self.task, self.method, str(self.parameters), f"seed{self.seed}")
        return "-".join(re.sub(r"[^\w.]+", "-", word) for word in words).lower()

    def save(self, folder: str | Path = RUNS) -> Path:
        """Writes the record to ``<folder>/<name>.json``; the file appears whole or not at all.

        Raises:
            FileExistsError: there is a record of that name; it is not overwritten.
        """
        path = Path(folder) / f"{self.name}.json"
        if path.exists():
            raise FileExistsError(f"{path} is recorded already; rename that file to keep both")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Result:
        """Reads and checks what :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, lacks a field, has one too many, or a value is out of its range.
        """
        try:
            values = fields_of(cls, json.loads(Path(path).read_text(encoding="utf-8")), "the record")
            if not isinstance(values["scores"], list):
                raise ValueError("scores: must be a list of scores")
            scores = [
                Measured(**fields_of(Measured, score, f"scores[{i}]")) for i, score in enumerate(values.pop("scores"))
            ]
            return cls(**values, scores=tuple(scores))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is no record for the register: {error}") from error


def record(
    run: Run,
    scores: Iterable[Measured],
    *,
    model: str,
    revision: str,
    prompt: str,
    sent_by: str,
    hardware: str = "",
    bits_per_number: int = 32,
    basis_bits: int = 0,
    notes: str = "",
) -> Result:
    """Makes the public record of a run.

    Args:
        run: what training returned.
        scores: from :func:`measured`, at least one.
        model: the base's name, of the hub or one's own; this and the next three are those of :class:`Result`.
        revision: the commit of the hub, or ``"local"``.
        prompt: how a problem was put.
        sent_by: who answers for it.
        hardware: what it ran on; empty takes the machine that the run noted.
        bits_per_number: of v as it was scored.
        basis_bits: of calibrated directions.
        notes: whatever a reader must know.

    Raises:
        ValueError: a value that the register does not take; the message says which and why.
    """
    from tinylora_lite import __version__

    versions = {name: version for name, version in run.environment.items() if name not in ("tinylora_lite", "machine")}
    return Result(
        model=model,
        revision=revision,
        base=run.base,
        task=run.task,
        prompt=prompt,
        method=run.method,
        adapter=run.adapter,
        parameters=run.parameters,
        bits=bits_per_number * run.parameters,
        basis_bits=basis_bits,
        settings=run.settings,
        seed=run.seed,
        scores=tuple(scores),
        curve=_in_short(run),
        seconds=run.seconds,
        hardware=hardware or run.environment["machine"],
        versions=versions,
        library=run.environment.get("tinylora_lite", __version__),
        commit=_commit(),
        sent_by=sent_by,
        notes=notes,
    )


def collect(folder: str | Path = RUNS) -> list[Result]:
    """Every record of a folder, in the order of their names; none where there is no folder.

    Raises:
        ValueError: a file is no record; the message names it.
    """
    return [Result.load(path) for path in sorted(Path(folder).glob("*.json"))]


def _in_short(run: Run) -> dict[str, float]:
    rewards = [row["reward"] for row in run.steps if "reward" in row]
    curve: dict[str, float] = {"steps": len(run.steps)}
    if rewards:
        tenth = max(1, len(rewards) // 10)
        curve |= {"first": sum(rewards[:tenth]) / tenth, "last": sum(rewards[-tenth:]) / tenth}
    return curve


def _commit() -> str:
    """The commit of a checkout, with a mark where it was changed since; empty where this is none."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return ""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"],
            cwd=root,
            capture_output=True,
            check=True,
            text=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return found.stdout.strip()


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns 0 where every record is good and 1 where one is not, with a line on stderr."""
    from rich.console import Console

    parser = argparse.ArgumentParser(prog="python -m tinylora_lite.book.runs", description="The register of runs.")
    parts = parser.add_subparsers(dest="part", required=True)
    made = parts.add_parser("make", help="make the record of a finished `tinylora train`")
    made.add_argument("folder", type=Path, metavar="FOLDER")
    made.add_argument("--sent-by", required=True, metavar="NAME", help="who answers for the run")
    made.add_argument("--revision", default="", help="the hub's commit of the base, if the settings do not pin it")
    made.add_argument("--hardware", default="", help="what it ran on (default: what the run noted)")
    made.add_argument("--notes", default="", help="whatever a reader must know")
    made.add_argument("--to", type=Path, default=RUNS, metavar="FOLDER", help="where it goes (default: %(default)s)")
    checked = parts.add_parser("check", help="check records before they are sent in")
    checked.add_argument("files", nargs="+", type=Path, metavar="FILE")
    shown = parts.add_parser("table", help="print what was published and what is recorded")
    shown.add_argument("--model", help="of one model, for example Qwen2.5-7B-Instruct")
    shown.add_argument("--task", help="of one task, for example gsm8k")
    arguments = parser.parse_args(argv)
    if arguments.part == "table":
        from tinylora_lite.book.register_table import table

        Console().print(table(arguments.model, arguments.task).rich())
        return 0
    if arguments.part == "make":
        from tinylora_lite.book.submission import from_folder

        options = {name: getattr(arguments, name) for name in ("sent_by", "revision", "hardware", "notes")}
        try:
            path = from_folder(arguments.folder, **options).save(arguments.to)
        except (OSError, ValueError) as error:
            return _failed(error)
        return _check_file(path)
    return max(_check_file(path) for path in arguments.files)


def _check_file(path: Path) -> int:
    try:
        result = Result.load(path)
    except (OSError, ValueError) as error:
        return _failed(error)
    print(f"{path}: good; in the register it is {RUNS.name}/{result.name}.json")
    for score in result.scores:
        base, adapted = score.base["accuracy"], score.adapted["accuracy"]
        where = f"{score.task}, temperature {score.temperature:g}, n = {score.base['n']}"
        print(f"  {where}: {base:.1%} -> {adapted:.1%}")
    return 0


def _failed(error: Exception) -> int:
    print(" ".join(str(error).split()), file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
