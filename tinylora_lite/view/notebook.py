"""Training as one watches it in a notebook: curves, scores, v itself, and samples to read.

The picture is HTML of our own in a widget, sent at most once a second and never for more than 1 % of the time. Training
never fails by it: whatever goes wrong while drawing is said once, and lines of text take the picture's place.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tinylora_lite.evaluation.score import Score
from tinylora_lite.sampling.rollouts import Rollouts
from tinylora_lite.view import dashboard_html as html
from tinylora_lite.view.progress import PlainProgress, Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EVERY = 1.0
"""Seconds between two pictures at least."""

SHARE = 0.01
"""Of the time, that may go into pictures of steps."""

SAMPLES = 8
"""Completions of a step that can be read."""

FRONT_ENDS = ("JPY_SESSION_NAME", "VSCODE_PID", "COLAB_RELEASE_TAG", "KAGGLE_URL_BASE")
"""Environment variables of kernels that someone looks at: Jupyter's, VS Code's, Colab's, Kaggle's.

A notebook that is run from top to bottom by a program has none of them, and would store a widget that shows nothing.
"""


class Dashboard(Progress):
    """A live view of :func:`~tinylora_lite.experiment.run.run_experiment` in a notebook.

    In Jupyter, VS Code, Colab and Kaggle a picture is drawn and stays behind as plain HTML; elsewhere, or without
    ipywidgets, lines are printed.

    >>> with Dashboard(tokenizer) as board:  # doctest: +SKIP
    ...     run_experiment(settings, progress=board, on_rollouts=board.rollouts)

    Args:
        tokenizer: shows the prompts beside the completions; ``None`` leaves them out.
        live: whether to draw; ``None`` looks whether someone would see it.
        measure: what the curve of training is: the reward, or the loss.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase | None = None, *, live: bool | None = None, measure: str = "reward"
    ) -> None:
        super().__init__()
        self.tokenizer, self.measure = tokenizer, measure
        self.trouble: str | None = None
        """What went wrong while drawing; nothing is drawn after it."""
        self._plain = PlainProgress(sys.stdout)
        self._rows: dict[str, str] = {}
        self._titles: list[str] = []
        self._texts: list[str] = []
        self._draw_next = 0.0
        self._phase_at, self._phase_done = time.perf_counter(), -1
        self._view: _View | None = None
        if has_front_end() if live is None else live:
            self._safely(self._open)

    def _open(self) -> None:
        self._view = _View()

    @property
    def live(self) -> bool:
        """Whether a picture is drawn."""
        return self._view is not None and self.trouble is None

    def begin(self, phase: str, total: int = 0) -> None:
        """A new phase of ``total`` parts."""
        super().begin(phase, total)
        self._phase_at, self._phase_done = time.perf_counter(), -1
        self._tell(lambda: self._plain.begin(phase, total), now=True)

    def advance(self, done: int, total: int) -> None:
        """``done`` of ``total`` parts of the phase are over."""
        super().advance(done, total)
        self._count_from(done)
        self._tell(lambda: self._plain.advance(done, total))

    def step(self, name: str, rewards: Sequence[float], vectors: Sequence[float]) -> None:
        """A step of training."""
        super().step(name, rewards, vectors)
        self._count_from(len(rewards))
        self._plain.steps = self.steps
        self._tell(lambda: self._plain.step(name, rewards, vectors))

    def scored(self, name: str, score: Score) -> None:
        """Something was evaluated."""
        super().scored(name, score)
        self._safely(lambda: self._rows.update({name: html.score_row(name, score)}))
        self._tell(lambda: self._plain.scored(name, score), now=True)

    def rollouts(self, rollouts: Rollouts, rewards: Tensor) -> None:
        """Keeps some completions to read; give it to ``run_experiment`` as ``on_rollouts``.

        Args:
            rollouts: what was sampled.
            rewards: ``[prompts, group_size]`` float.
        """
        self._safely(lambda: self._keep(rollouts, rewards))

    def page(self) -> str:
        """The picture as HTML that needs no widget, the samples folded below it."""
        return self._picture() + html.folded(self._titles, self._texts)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leaves the last picture as plain HTML: a stored widget would need its kernel to be seen again."""
        if kind is None:
            super().begin("done")
        if self._view is not None:
            view, self._view = self._view, None
            self._safely(lambda: view.leave(self.page()))

    def _picture(self) -> str:
        rewards, lengths = self.curves, self.lengths
        base = next(iter(self.scores.values())).accuracy if len(self.scores) and self.measure == "reward" else None
        steps = self.steps
        parts = [
            html.phase_line(self.phase, self.done, self.total, time.perf_counter() - self.started, self._left()),
            html.panel(
                f"{self.measure} of each step",
                html.chart(rewards, steps=steps, unit=self.measure, share=self.measure == "reward", base=base),
            ),
            html.panel(
                "length of completions, tokens", html.chart(lengths, steps=steps, unit="mean tokens", share=False)
            ),
        ]
        for name, values in list(self.vectors.items())[-1:]:
            if values:
                parts.append(html.panel("v itself", html.bars(values), f"{name}: {html.reach(values)}"))
        parts.append(html.panel("pass@1 and its 95 % interval", html.score_rows(list(self._rows.values()))))
        return html.frame(*parts)

    def _keep(self, rollouts: Rollouts, rewards: Tensor) -> None:
        group = rewards.shape[1]
        # Groups that disagree first: the others teach nothing in this step.
        order = sorted(range(len(rewards)), key=lambda i: bool((rewards[i] == rewards[i, 0]).all()))
        rows = [g * group + i for g in order for i in range(group)][:SAMPLES]
        values, lengths = rewards.flatten().tolist(), rollouts.lengths.tolist()
        self._titles = [
            html.sample_title(number, values[row], lengths[row], bool(rollouts.truncated[row]))
            for number, row in enumerate(rows, 1)
        ]
        self._texts = [html.sample_text(self._prompt(rollouts, row), rollouts.texts[row]) for row in rows]
        if self._view is not None and self.trouble is None:
            self._view.show_samples(self._titles, self._texts)

    def _prompt(self, rollouts: Rollouts, row: int) -> str:
        if self.tokenizer is None:
            return ""
        ids = rollouts.prompt_ids[row][rollouts.prompt_mask[row].bool()]
        return str(self.tokenizer.decode(ids))

    def _count_from(self, done: int) -> None:
        if self._phase_done < 0:  # an interrupted run begins anywhere, and only what follows was timed
            self._phase_at, self._phase_done = time.perf_counter(), done

    def _left(self) -> float | None:
        timed = self.done - self._phase_done
        if self._phase_done < 0 or timed <= 0 or self.total <= self.done:
            return None
        return (time.perf_counter() - self._phase_at) / timed * (self.total - self.done)

    def _tell(self, in_a_line: Callable[[], None], now: bool = False) -> None:
        if self._view is None or self.trouble is not None:
            in_a_line()
            return
        start = time.perf_counter()
        if now or start >= self._draw_next:
            view = self._view
            self._safely(lambda: view.show(self._picture()))
            self._draw_next = start + max(EVERY, (time.perf_counter() - start) / SHARE)

    def _safely(self, draw: Callable[[], Any]) -> None:
        if self.trouble is not None:
            return
        try:
            draw()
        except Exception as error:  # whatever it is, it must not end a run of hours
            self.trouble = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"The dashboard stopped, training goes on ({self.trouble}).", flush=True)


class _View:
    """The widgets: a picture, and samples that open in the browser, where the busy kernel need not answer."""

    def __init__(self) -> None:
        import ipywidgets as widgets
        from IPython import display

        self._display: Any = display
        self._picture = widgets.HTML()
        self._pages = [widgets.HTML() for _ in range(SAMPLES)]
        self._samples = widgets.Accordion(children=[])
        self._box = widgets.VBox([self._picture, self._samples])
        self._display.display(self._box)

    def show(self, picture: str) -> None:
        self._picture.value = picture

    def show_samples(self, titles: Sequence[str], texts: Sequence[str]) -> None:
        for page, text in zip(self._pages, texts, strict=False):
            page.value = text
        if len(self._samples.children) != len(texts):
            self._samples.children = self._pages[: len(texts)]
            self._samples.selected_index = None
        for place, title in enumerate(titles):
            self._samples.set_title(place, title)

    def leave(self, page: str) -> None:
        self._box.close()
        self._display.display(self._display.HTML(page))


def has_front_end() -> bool:
    """Whether this is a notebook that someone looks at, with ipywidgets to draw by."""
    if "IPython" not in sys.modules or not any(name in os.environ for name in FRONT_ENDS):
        return False
    from importlib.util import find_spec

    from IPython.core.getipython import get_ipython

    shell = get_ipython()
    return shell is not None and hasattr(shell, "kernel") and find_spec("ipywidgets") is not None
