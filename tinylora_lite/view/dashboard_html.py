"""The pieces of the dashboard as HTML and SVG: numbers in, text out.

No colour stands alone: curves have dashes and a label of their own, numbers show their sign by their direction, right
and wrong are words. Text and ground are the notebook's where it says what they are, and dark on white elsewhere.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from html import escape as _escape

from tinylora_lite.evaluation.score import Score
from tinylora_lite.view.progress import COLOURS

MOST_POINTS = 400
"""Steps that a curve draws at most; of more, some are left out."""

MOST_BARS = 64
"""Numbers drawn as a bar each; more become columns, each from its least to its greatest."""

COLUMNS = 200
"""How many such columns."""

DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2", "1 2", "12 4")

_GROUND = "var(--colab-primary-surface-color,var(--vscode-editor-background,var(--jp-layout-color0,#fff)))"
_INK = "var(--colab-primary-text-color,var(--vscode-editor-foreground,var(--jp-ui-font-color0,#1b1f24)))"
_FRAME = f"background:{_GROUND};color:{_INK};font:13px/1.45 system-ui,sans-serif;padding:10px;box-sizing:border-box"
_FAINT = "opacity:.72"
_TEXT = "white-space:pre-wrap;overflow-wrap:anywhere;font:12px/1.45 ui-monospace,monospace"
_WIDTH, _HEIGHT = 360, 150
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 8, 8, 18


def escape(text: str, quote: bool = True) -> str:
    """Text as HTML; control characters and halves of characters, which no page can hold, become a sign of their own."""
    return _escape(re.sub(r"[^\n\t\x20-\ud7ff\ue000-\U0010ffff]", "\ufffd", text), quote)


def frame(*parts: str) -> str:
    """The panels beside one another, or below one another where there is no room."""
    return f'<div style="{_FRAME}"><div style="display:flex;flex-wrap:wrap;gap:14px 22px">{"".join(parts)}</div></div>'


def panel(title: str, content: str, note: str = "") -> str:
    """One panel; ``title`` and ``note`` are plain text."""
    beside = f' <span style="{_FAINT};font-weight:400">{escape(note)}</span>' if note else ""
    head = f'<div style="font-weight:600;margin-bottom:3px">{escape(title)}{beside}</div>'
    return f'<div style="flex:1 1 290px;min-width:0;max-width:560px">{head}{content}</div>'


def chart(
    curves: Mapping[str, Sequence[float]], *, steps: int, unit: str, share: bool, base: float | None = None
) -> str:
    """Curves against the step, the last value of each below them.

    Args:
        curves: values of every step so far, by the name of the run; what is not finite is a gap.
        steps: the length of a complete curve.
        unit: what the values are, in words.
        share: whether the values lie between 0 and 1, as rewards mostly do.
        base: where the untrained model stands, a dotted line.
    """
    found = [value for values in curves.values() for value in values if math.isfinite(value)]
    if not found:
        return f'<div style="{_FAINT}">nothing yet</div>'
    inside = share and min(found) >= 0 and max(found) <= 1
    low, high = (0.0, 1.0) if inside else (min(0.0, *found), max(found))
    high = high if high > low else low + 1
    steps = max(steps, 2, *map(len, curves.values()))

    def place(step: float, value: float) -> str:
        x = _LEFT + (step - 1) / (steps - 1) * (_WIDTH - _LEFT - _RIGHT)
        y = _TOP + (high - value) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)
        return f"{x:.1f},{y:.1f}"

    parts, legend = [], []
    for value in (low, (low + high) / 2, high):
        y = place(1, value).split(",")[1]
        parts.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}" stroke="currentColor" opacity=".2"/>'
            f'<text x="{_LEFT - 5}" y="{y}" dy=".35em" text-anchor="end">{_brief(value)}</text>'
        )
    if base is not None and low <= base <= high:
        (x1, y1), (x2, y2) = (place(step, base).split(",") for step in (1, steps))
        parts.append(
            f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="currentColor" stroke-dasharray="1 4" '
            'stroke-width="1.6" stroke-linecap="round"/>'
        )
        legend.append(f"<span>···· base {_brief(base)}</span>")
    for number, (name, values) in enumerate(curves.items()):
        colour, dash = COLOURS[number % len(COLOURS)], DASHES[number % len(DASHES)]
        look = f'fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}" stroke-linejoin="round"'
        for line in _unbroken(values):
            points = " ".join(place(step, value) for step, value in line)
            if len(line) == 1:
                x, y = points.split(",")
                parts.append(f'<circle cx="{x}" cy="{y}" r="2.2" fill="{colour}"/>')
            else:
                parts.append(f'<polyline points="{points}" {look}/>')
        sample = f'<svg width="26" height="8" aria-hidden="true"><path d="M0 4H26" {look}/></svg>'
        last = _brief(values[-1]) if values else "no value yet"
        legend.append(f"<span>{sample} {escape(name)} {last}</span>")
    parts.append(
        f'<text x="{_LEFT}" y="{_HEIGHT - 4}">step 1</text>'
        f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 4}" text-anchor="end">{steps}</text>'
    )
    said = "; ".join(f"{name}: {_brief(values[-1])} at step {len(values)}" for name, values in curves.items() if values)
    below = f'<div style="display:flex;flex-wrap:wrap;gap:0 14px">{"".join(legend)}</div>'
    return _svg(f"{unit} against the step. {said}", "".join(parts)) + below


def bars(values: Sequence[float]) -> str:
    """Each number as a bar up or down from zero; of many, columns from the least to the greatest."""
    finite = [value for value in values if math.isfinite(value)]
    most = max(map(abs, finite), default=0.0)
    if len(values) > MOST_BARS:
        size = math.ceil(len(values) / min(COLUMNS, len(values)))
        groups = [values[start : start + size] for start in range(0, len(values), size)]
    else:
        groups = [[value] for value in values]
    middle, height, room = 50.0, 46.0, _WIDTH / max(1, len(groups))
    parts = [f'<line x1="0" x2="{_WIDTH}" y1="50" y2="50" stroke="currentColor" stroke-width="1.2"/>']
    for number, group in enumerate(groups):
        inside = [value for value in group if math.isfinite(value)]
        if not inside or not most:
            continue
        top, foot = (middle - value / most * height for value in (max(0.0, *inside), min(0.0, *inside)))
        x, width = number * room + 0.1 * room, min(0.8 * room, 14)
        parts.append(
            f'<rect x="{x:.1f}" y="{top:.1f}" width="{width:.1f}" height="{foot - top:.1f}" fill="{COLOURS[0]}"/>'
        )
    up, down = sum(value > 0 for value in finite), sum(value < 0 for value in finite)
    said = f"The {len(values):,} trained numbers: {up:,} above zero, {down:,} below, the largest {most:.3g}"
    return _svg(said, "".join(parts), height=100)


def reach(values: Sequence[float]) -> str:
    """How many numbers there are and how far they are from zero, in words."""
    finite = [value for value in values if math.isfinite(value)]
    lost = "" if len(finite) == len(values) else f", {len(values) - len(finite)} not finite"
    most, norm = max(map(abs, finite), default=0.0), math.hypot(*finite)
    return f"{len(values):,} number{'' if len(values) == 1 else 's'}, up to ±{most:.3g}, norm {norm:.3g}{lost}"


def score_row(name: str, score: Score) -> str:
    """A score in a row: pass@1, its interval on a scale from 0 to 100 %, how many problems."""
    low, middle, high = (100 * min(1.0, max(0.0, v)) for v in (score.low, score.accuracy, score.high))
    scale = (
        '<svg viewBox="0 0 100 12" width="100" height="12" aria-hidden="true">'
        '<line x1="0" x2="100" y1="6" y2="6" stroke="currentColor" opacity=".3"/>'
        f'<line x1="{low:.1f}" x2="{high:.1f}" y1="6" y2="6" stroke="{COLOURS[0]}" stroke-width="3"/>'
        f'<circle cx="{middle:.1f}" cy="6" r="4" fill="{COLOURS[0]}"/></svg>'
    )
    lenient = score.lenient
    beside = "" if lenient is None else f"; lenient {lenient.accuracy:.1%}"
    words = f"{score.accuracy:.1%} [{score.low:.1%}, {score.high:.1%}]{beside}; n = {score.n:,}"
    look = "display:flex;flex-wrap:wrap;gap:0 10px;align-items:center;margin-bottom:4px"
    return f'<div style="{look}"><span>{escape(name)}</span>{scale}<span>{words}</span></div>'


def score_rows(rows: Sequence[str]) -> str:
    """The scores so far, rows of :func:`score_row`."""
    return "".join(rows) or f'<div style="{_FAINT}">not evaluated yet</div>'


def phase_line(phase: str, done: int, total: int, elapsed: float, left: float | None) -> str:
    """What is done now, how far it is, and when it may end; times in seconds."""
    words = [f"<b>{escape(phase or 'getting ready')}</b>"]
    if total:
        share = 100 * min(1.0, max(0.0, done / total))
        words.append(
            '<span style="display:inline-block;width:140px;height:9px;border:1px solid currentColor;border-radius:5px;'
            f'overflow:hidden;vertical-align:middle"><span style="display:block;width:{share:.1f}%;height:100%;'
            f'background:{COLOURS[0]}"></span></span>'
        )
        words.append(f"{done:,} of {total:,}")
    words.append(f"{duration(elapsed)} since the start")
    if left is not None and math.isfinite(left):
        words.append(f"about {duration(left)} left of this")
    spaced = "".join(f"<span>{word}</span>" for word in words)
    return f'<div style="flex:1 1 100%;display:flex;flex-wrap:wrap;gap:2px 14px;align-items:center">{spaced}</div>'


def sample_title(number: int, reward: float, tokens: int, truncated: bool) -> str:
    """A completion in a line, as plain text."""
    return f"{number}: reward {_brief(reward)}, {tokens:,} tokens{', cut off at the limit' if truncated else ''}"


def sample_text(prompt: str, completion: str) -> str:
    """A prompt and what was answered, whatever characters they hold."""
    look = f"{_TEXT};margin:2px 0 10px;color:inherit;background:none"
    shown = [("prompt", prompt), ("completion", completion)] if prompt else [("completion", completion)]
    parts = [
        f'<div style="{_FAINT}">{name}</div><pre style="{look}">{escape(text, quote=False)}</pre>'
        for name, text in shown
    ]
    return f'<div style="{_FRAME};max-height:26em;overflow-y:auto">{"".join(parts)}</div>'


def folded(titles: Sequence[str], texts: Sequence[str]) -> str:
    """Samples that a reader opens one by one; for a page without widgets."""
    look = f'style="{_FRAME};padding:3px 10px"'
    return "".join(
        f'<details {look}><summary style="cursor:pointer">{escape(title)}</summary>{text}</details>'
        for title, text in zip(titles, texts, strict=True)
    )


def duration(seconds: float) -> str:
    """A time as one would say it.

    >>> [duration(s) for s in (7, 250, 6720, 90000)]
    ['7 s', '4 min', '1 h 52 min', '25 h 0 min']
    """
    seconds = int(seconds)
    if seconds < 120:
        return f"{seconds} s"
    return f"{seconds // 60} min" if seconds < 3600 else f"{seconds // 3600} h {seconds // 60 % 60} min"


def _svg(said: str, content: str, height: int = _HEIGHT) -> str:
    look = 'style="display:block;width:100%;height:auto" fill="currentColor" font-size="11"'
    return f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(said)}" {look}>{content}</svg>'


def _unbroken(values: Sequence[float]) -> list[list[tuple[int, float]]]:
    """The stretches of finite values, each as (step, value), thinned out where there are many."""
    stride = math.ceil(len(values) / MOST_POINTS) or 1
    kept = [i for i in range(len(values)) if i % stride == 0 or i == len(values) - 1]
    lines: list[list[tuple[int, float]]] = [[]]
    for i in kept:
        if math.isfinite(values[i]):
            lines[-1].append((i + 1, values[i]))
        else:
            lines.append([])
    return [line for line in lines if line]


def _brief(value: float) -> str:
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
