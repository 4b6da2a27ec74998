"""From the folder of a finished experiment to a record for the register."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tinylora_lite.adapter.basis import load_basis
from tinylora_lite.book.runs import Result, measured, record
from tinylora_lite.evaluation.score import Score
from tinylora_lite.experiment.settings import RunSettings, load_settings
from tinylora_lite.utils.record import Run

BITS = {"float32": 32, "bfloat16": 16, "float16": 16}


def from_folder(folder: str | Path, *, sent_by: str, revision: str = "", hardware: str = "", notes: str = "") -> Result:
    """Makes the public record of what ``tinylora train`` left in a folder.

    Args:
        folder: the ``folder`` of the settings.
        sent_by: who answers for the run.
        revision: the hub's commit of the base, where the settings do not pin it by its 40 digits.
        hardware: what it ran on; empty takes the machine that the run noted.
        notes: whatever a reader must know.

    Raises:
        FileNotFoundError: the folder holds no finished experiment.
        ValueError: a file of it is damaged, or the base's commit is not known.
    """
    folder = Path(folder)
    if not (folder / "outcome.json").exists():
        raise FileNotFoundError(f"{folder} holds no outcome.json; `tinylora train` writes it when it is done")
    outcome = json.loads((folder / "outcome.json").read_text(encoding="utf-8"))
    settings = load_settings(folder / "settings.yaml").model_copy(update={"folder": str(folder)})
    runs = settings.sweep()
    chosen = next((one for one in runs if one.training.get("learning_rate") == outcome["learning_rate"]), runs[0])
    run = Run.load(Path(chosen.folder) / "run.json")
    prompt, scores = "", []
    for task, base_summary in outcome["base"].items():
        base = _score(folder / "base" / task, base_summary)
        adapted = _score(folder / "trained" / task, outcome["trained"][task])
        prompt = prompt or base.completions[0].prompt
        scores.append(measured(task, base, adapted, temperature=settings.evaluation.temperature))
    local = settings.model == "nano" or Path(settings.model).is_dir()
    return record(
        run,
        scores,
        model=Path(settings.model).name if local else settings.model,
        revision="local" if local and not revision else revision or settings.revision or "not pinned",
        prompt=f"{settings.prompt or 'the default of the task'}; the first problem: {prompt}",
        sent_by=sent_by,
        hardware=hardware,
        bits_per_number=BITS[settings.dtype] if settings.adapter.kind == "all" else 32,
        basis_bits=_basis_bits(settings),
        notes=notes,
    )


def _score(folder: Path, summary: dict[str, Any]) -> Score:
    """A score as it was kept: whole, or in the parts that several processes dealt among themselves."""
    if (folder / "evaluation.json").exists():
        return Score.load(folder)
    parts = sorted(folder.glob("*-of-*"), key=lambda part: int(part.name.partition("-")[0]))
    if not parts:
        raise FileNotFoundError(f"{folder} holds no evaluation; run `tinylora train` with this folder again")
    dealt, samples = [Score.load(part).completions for part in parts], int(summary["samples"])
    whole = (dealt[i % len(dealt)][i // len(dealt) * samples :][:samples] for i in range(int(summary["n"])))
    return Score.of((completion for each in whole for completion in each), samples)


def _basis_bits(settings: RunSettings) -> int:
    adapter = settings.adapter
    if not adapter.calibrated:
        return 0
    made_here = adapter.projection == "calibrated"
    basis = load_basis(Path(settings.folder) / "basis.safetensors" if made_here else adapter.projection)
    return 32 * basis.directions.numel()
