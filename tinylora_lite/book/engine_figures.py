"""How far samplers are from the trainer, drawn from the record of ``benchmarks/sampler_gap.py``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from tinylora_lite.view.plot import INK, METHODS, figure, label_at_the_right, style

LOOKS = {
    "transformers": ("the model itself", INK, "--"),
    "vllm, lora": ("vLLM, LoRA", METHODS["calibrated"].colour, "-"),
    "vllm, merged": ("vLLM, merged", METHODS["tinylora"].colour, "-."),
}
"""Of each engine of the record, its name, its colour and its line."""


@style()
def sampler_gaps(runs: Sequence[Mapping[str, Any]], dtype: str) -> Figure:
    """The mean absolute difference of log-probabilities against steps: every seed thin, their mean thick.

    Args:
        runs: of the record.
        dtype: ``"bfloat16"`` or ``"float32"``.

    Raises:
        ValueError: there are no runs in that dtype.
    """
    drawn, axes = figure()
    ends: list[tuple[float, str, str]] = []
    for engine, (label, colour, line) in LOOKS.items():
        own = [run["curves"] for run in runs if (run["engine"], run["dtype"]) == (engine, dtype)]
        curves = [of_run["logprob_diff_mean"] for of_run in own]
        if not curves:
            continue
        steps = range(1, len(curves[0]) + 1)
        for curve in curves:
            axes.plot(steps, curve, color=colour, lw=0.8, alpha=0.45)
        mean = np.mean(curves, axis=0)
        axes.plot(steps, mean, line, color=colour, lw=2.4)
        ends.append((float(mean[-1]), label, colour))
    if not ends:
        raise ValueError(f"the record holds no runs in {dtype}")
    axes.set(xlabel="step", ylabel="mean |difference|, nats a token")
    axes.set_xlim(1, len(mean))
    axes.set_ylim(bottom=0)
    label_at_the_right(axes, ends)
    return drawn
