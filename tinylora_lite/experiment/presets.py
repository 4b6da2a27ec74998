"""Settings to start from: the paper's recipes on its models, as far as the paper tells them, for a GPU; and CPU runs.

``presets.yaml`` beside this file holds what they are made of, and the notes at the head of a printed preset: where it
departs from the paper and why.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinylora_lite.experiment import settings_file
from tinylora_lite.experiment.settings import RunSettings

TABLE: dict[str, dict[str, Any]] = settings_file.read(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
BASES = TABLE["bases"]
"""The models of the presets at full size, and the settings that are theirs alone."""

GPUS = ("t4", "a100-80gb", "h100")
"""The GPUs that a preset comes for; ``tinylora plan-run`` takes others."""

FORK = ("qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-7b")
"""The models that the first author's fork has scripts for, on GSM8K."""

ON_CPU = ("nano", "nano/sft", "nano/calibrated", "smollm2-135m/words-1")
"""The presets for a CPU; they come first in the list."""


def preset_names() -> tuple[str, ...]:
    """All presets, ``qwen2.5-7b/gsm8k`` and so on; those without a method's name train by GRPO."""
    # The hard MATH problems come with answers and without worked solutions, so there is nothing to imitate.
    recipes = ("gsm8k", "gsm8k/sft", "gsm8k/calibrated", "math", "math/calibrated")
    forks = (f"{base}/gsm8k/fork" for base in FORK)
    return (*ON_CPU, *(f"{base}/{recipe}" for base in BASES for recipe in recipes), *forks)


def preset(name: str, gpu: str | None = None) -> RunSettings:
    """The settings of a preset.

    Args:
        name: one of :func:`preset_names`.
        gpu: one of ``GPUS``; ``None`` takes the A100 of 80 GB. Those for a CPU need none.

    Raises:
        ValueError: there is no such preset, or none for this GPU.
    """
    values: dict[str, Any] = {"folder": f"runs/{name}"}
    for part in _parts(BASES | TABLE["settings"], name, gpu):
        _update(values, part)
    return RunSettings.from_dict(values)


def describe(name: str, gpu: str | None = None) -> str:
    """Where a preset departs from the paper and why, in paragraphs."""
    title = name if name in ON_CPU else f"{name}, for {gpu or 'a100-80gb'}; paper: arXiv 2602.04118"
    run = preset(name, gpu)
    return "\n\n".join([title, *(note.format(run=run) for note in _parts(TABLE["notes"], name, gpu))])


def gpu_name(gpu: str) -> str:
    """The name that presets and plans know a GPU by: ``a100-80gb`` for ``A100``."""
    return {"a100": "a100-80gb", "h100-80gb": "h100", "rtx4090": "4090"}.get(gpu.lower(), gpu.lower())


def _parts(table: dict[str, Any], name: str, gpu: str | None) -> Iterator[Any]:
    """The entries of a table whose words all hold of a preset."""
    if name not in preset_names():
        raise ValueError(f"no preset named {name}; tinylora preset lists them ({preset_names()[4]}, for one)")
    words = {*name.split("/"), "sft" if name.endswith("/sft") else "grpo"}
    words.add("calibrated" if name.endswith("/calibrated") else "random")
    if name not in ON_CPU:
        gpu = gpu_name(gpu or "a100")
        if gpu not in GPUS:
            nearest = "take the nearest, and ask tinylora plan-run"
            raise ValueError(f"presets are for {', '.join(GPUS)}, not {gpu}; {nearest}")
        words |= {"paper", name.split("/")[0].rsplit("-", 1)[1], "t4" if gpu == "t4" else "vllm"}
    elif gpu is not None:
        raise ValueError(f"the preset {name} runs on a CPU; leave the GPU out")
    return (value for key, value in table.items() if words.issuperset(key.split()))


def _update(values: dict[str, Any], part: dict[str, Any]) -> None:
    for key, value in part.items():
        if isinstance(value, dict):
            _update(values.setdefault(key, {}), value)
        else:
            values[key] = value
