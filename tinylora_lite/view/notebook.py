"""Training as a notebook shows it: reward, length, v, scores, and completions to read, updated in place.

The display must neither slow training down nor end it. An error while drawing is printed once, and lines of text take
the place of the display.
"""

from __future__ import annotations

import io
import os
import re
import sys
import time
from collections.abc import Callable
from html import escape
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from rich.console import Console
from torch import Tensor

from tinylora_lite.adapter.adapter import TinyLoraAdapter
from tinylora_lite.sampling.rollouts import Rollouts
from tinylora_lite.utils.record import Run
from tinylora_lite.view.progress import COLOURS, PlainProgress, Progress, score_table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EVERY, SHARE = 1.0, 0.01
"""Seconds between two drawings at least, and the part of the time that drawing may take."""

SAMPLES = 8
"""Completions of a step that are shown."""

UNSHOWN = re.compile(r"[^\n\t\x20-\ud7ff\ue000-\U0010ffff]")
"""Control characters and surrogates, which a page cannot hold."""

FRONT_ENDS = ("JPY_SESSION_NAME", "VSCODE_PID", "COLAB_RELEASE_TAG", "KAGGLE_URL_BASE")
"""Environment variables of kernels that have a reader; a program that runs a notebook would store an empty widget."""

# Explicit colours, since VS Code shows widgets on white in a dark theme, too.
FRAME = (
    "background:var(--colab-primary-surface-color,var(--vscode-editor-background,var(--jp-layout-color0,#fff)));"
    "color:var(--colab-primary-text-color,var(--vscode-editor-foreground,var(--jp-ui-font-color0,#1b1f24)));padding:8px"
)
TEXT = "white-space:pre-wrap;overflow-wrap:anywhere;font:12px/1.45 ui-monospace,monospace;color:inherit;background:none"


class Dashboard(Progress):
    """A live view of training in a notebook, for every loop that takes ``on_step`` and ``on_rollouts``.

    In Jupyter, VS Code, Colab and Kaggle it needs ipywidgets and matplotlib, and stays behind as plain HTML. Elsewhere,
    or without them, it prints lines.

    >>> with Dashboard(tokenizer, adapter) as board:  # doctest: +SKIP
    ...     tl.train_grpo(..., on_step=board.on_step, on_rollouts=board.on_rollouts)
    >>> with Dashboard(tokenizer) as board:  # doctest: +SKIP
    ...     run_experiment(settings, progress=board, on_rollouts=board.on_rollouts)

    Args:
        tokenizer: decodes the prompts; without it completions are shown alone.
        adapter: :meth:`on_step` shows its v.
        live: whether to draw; ``None`` finds out whether there is a reader.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None = None,
        adapter: TinyLoraAdapter | None = None,
        *,
        live: bool | None = None,
    ) -> None:
        super().__init__()
        self.tokenizer, self.adapter = tokenizer, adapter
        self.live = has_front_end() if live is None else live  # False after drawing failed, too
        self._samples: list[tuple[str, str]] = []
        self._box: Any = None
        self._plain = PlainProgress(sys.stdout)
        self._draw_next = 0.0

    def on_step(self, runs: Run | list[Run]) -> None:
        """Shows a run, or the runs of a population, after each step."""
        runs = runs if isinstance(runs, list) else [runs]
        for number, run in enumerate(runs):
            name, last = run.method if len(runs) == 1 else f"{run.method}, adapter {number}", run.steps[-1]
            self.steps, self.measure = run.settings.get("steps", 1), "reward" if "reward" in last else "loss"
            if number == 0 and (name not in self.curves or len(run.steps) == 1):
                self.begin(f"training: {run.method}", self.steps)
            if "length" in last:
                self.lengths[name] = run.curve("length")
            v = [] if self.adapter is None else self.adapter.vectors.flatten().tolist()
            self.step(name, run.curve(self.measure), v)

    def on_rollouts(self, rollouts: Rollouts, rewards: Tensor) -> None:
        """Keeps some completions of a step to read; ``rewards`` are ``[prompts, group_size]`` float."""
        self._safely(lambda: self._keep(rollouts, rewards))

    def begin(self, phase: str, total: int = 0) -> None:
        self._draw_next = 0.0
        super().begin(phase, total)

    def tell(self, line: str, minor: bool = False) -> None:
        start = time.perf_counter()
        if self.live and start >= self._draw_next:
            self._safely(self._draw)
            self._draw_next = start + max(EVERY, (time.perf_counter() - start) / SHARE)
        if not self.live:
            self._plain.tell(line, minor)

    def __exit__(self, *error: object) -> None:
        if self._box is not None:
            self._safely(self._leave)

    def page(self) -> str:
        """Everything as HTML that needs no widget, the samples folded."""
        folded = (f"<details><summary>{title}</summary>{text}</details>" for title, text in self._samples)
        return self._picture() + f'<div style="{FRAME}">{"".join(folded)}</div>'

    def _draw(self) -> None:
        pages = [self._picture(), *(text for _, text in self._samples)]
        if self._box is None:
            import ipywidgets

            self._pages = [ipywidgets.HTML() for _ in range(1 + SAMPLES)]
            self._accordion = ipywidgets.Accordion()  # opens in the browser, without asking the busy kernel
            self._box = ipywidgets.VBox([self._pages[0], self._accordion])
            import_module("IPython.display").display(self._box)
        for widget, page in zip(self._pages, pages, strict=False):
            widget.value = page
        self._accordion.children = self._pages[1 : len(pages)]
        for place, (title, _) in enumerate(self._samples):
            self._accordion.set_title(place, title)

    def _leave(self) -> None:
        """Leaves the last state as plain HTML, since a stored widget needs its kernel."""
        ipython, page = import_module("IPython.display"), self.page()
        self._box.close()
        self._box = None
        ipython.display(ipython.HTML(page))

    def _picture(self) -> str:
        console = Console(record=True, width=100, file=io.StringIO(), force_jupyter=False)
        console.print(self.bar, score_table(self.scores))
        text = console.export_html(inline_styles=True, code_format=f'<pre style="{TEXT}">{{code}}</pre>')
        return f'<div style="{FRAME}">{text}{self._figure()}</div>'

    def _figure(self) -> str:
        from matplotlib.figure import Figure

        from tinylora_lite.view import plot

        # The style's constrained layout would take half of the time.
        with plot.style({"figure.constrained_layout.use": False}):
            drawn = Figure(figsize=(2 * plot.WIDTH, 2.4))
            drawn.subplots_adjust(left=0.05, right=0.99, bottom=0.2, wspace=0.22)
            left, middle, right = drawn.subplots(1, 3)
            for axes, title, curves, top in (
                (left, f"{self.measure} of each step", self.curves, self.measure == "reward"),
                (middle, "mean tokens of a completion", self.lengths, 0),
            ):
                for number, (name, values) in enumerate(curves.items()):
                    look = {"color": COLOURS[number % 3], "ls": ("-", "--", ":", "-.")[number % 4]}
                    axes.plot(range(1, len(values) + 1), values, label=f"{name}: {values[-1]:.3g}", **look)
                    axes.legend(fontsize=8)
                axes.update_datalim([(1, 0), (max(2, self.steps), top)])  # the whole run and range are in view
                axes.autoscale_view()
                axes.set(title=title, xlabel="step")
            if self.scores and self.measure == "reward":
                left.axhline(next(iter(self.scores.values())).accuracy, ls="--", lw=1, color=plot.INK)
            v = next((v for v in reversed(self.vectors.values()) if v), [])
            plot.bars(right, v, COLOURS[0])
            right.set(title=f"v, {len(v):,} parameters")
        last = "; ".join(f"{name} {values[-1]:.3g}" for name, values in self.curves.items())
        return plot.show(drawn, f"The {self.measure} of each step ({last}), the length of completions, and v.").svg

    def _keep(self, rollouts: Rollouts, rewards: Tensor) -> None:
        # Groups whose rewards differ come first: the others give no gradient.
        alike = (rewards == rewards[:, :1]).all(dim=1).repeat_interleave(rewards.shape[1])
        self._samples = []
        for row in alike.int().argsort(stable=True)[:SAMPLES].tolist():
            shown = {"completion": rollouts.texts[row]}
            if self.tokenizer is not None:
                ids = rollouts.prompt_ids[row][rollouts.prompt_mask[row].bool()]
                shown = {"prompt": str(self.tokenizer.decode(ids))} | shown
            clean = {name: escape(UNSHOWN.sub("\ufffd", each)) for name, each in shown.items()}
            text = "".join(f'{name}<pre style="{TEXT}">{each}</pre>' for name, each in clean.items())
            cut = ", cut off at the limit" if rollouts.truncated[row] else ""
            reward = f"reward {rewards.flatten()[row]:.3g}, {rollouts.lengths[row]:,} tokens{cut}"
            self._samples.append((reward, f'<div style="{FRAME};max-height:26em;overflow-y:auto">{text}</div>'))

    def _safely(self, draw: Callable[[], None]) -> None:
        if not self.live:
            return
        try:
            draw()
        except Exception as error:  # whatever it is, it must not end a run of hours
            self.live = False
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"The dashboard stopped, training goes on ({reason}).", flush=True)


def has_front_end() -> bool:
    """Whether this is a notebook that has a reader, and ipywidgets to draw with."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    has_reader = any(name in os.environ for name in FRONT_ENDS)
    return has_reader and hasattr(shell, "kernel") and find_spec("ipywidgets") is not None
