"""What the book's pages show, as data, to compare one state of the code with another.

Every code cell of a page runs. Its figures, glued values and displayed tables go into one JSON file per page::

    python tests/notebooks/figure_data.py run OUT [PAGE ...] [--tree CHECKOUT]
    python tests/notebooks/figure_data.py compare OLD NEW

``run`` takes every page that needs no GPU, each in its own process. ``compare`` exits with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import numpy as np

DIGITS = 6  # significant ones, that are kept
TOLERANCE = 1e-5  # relative: a value that was rounded up here and down there is not a difference
IGNORED = {r"05_ship_it/glue/code_kb": "the size of the library's own code"}
"""Patterns of places, as ``compare`` prints them, that may differ, and why. All timings are read from records."""


def rounded(values: Any) -> Any:
    """Numbers with ``DIGITS`` significant digits in nested lists; of more than 5,000 the shape and a digest.

    >>> rounded([1 / 3, float("nan")])
    [0.333333, 'nan']
    """
    found = np.ma.filled(np.ma.asarray(values, dtype=float), np.nan)
    flat = [float(f"{value:.{DIGITS}g}") if math.isfinite(value) else str(value) for value in found.ravel().tolist()]
    if len(flat) > 5000:
        return {"shape": list(found.shape), "sha256": hashlib.sha256(repr(flat).encode()).hexdigest()}
    return np.array(flat, dtype=object).reshape(found.shape).tolist()


def data_of(axes: Any) -> dict[str, Any]:
    """What one pair of axes shows."""
    legend = axes.get_legend()
    return {
        "titles": [axes.get_title(place) for place in ("left", "center", "right")],
        "labels": [axes.get_xlabel(), axes.get_ylabel()],
        "limits": rounded([axes.get_xlim(), axes.get_ylim()]),
        "ticks": [[text.get_text() for text in axis.get_ticklabels()] for axis in (axes.xaxis, axes.yaxis)],
        "legend": [text.get_text() for text in legend.get_texts()] if legend else [],
        "lines": [[line.get_label(), rounded(line.get_xydata())] for line in axes.lines],
        "patches": [rounded(p.get_patch_transform().transform(p.get_path().vertices)) for p in axes.patches],
        "collections": [
            {
                "kind": type(one).__name__,
                "offsets": rounded(one.get_offsets()),
                "paths": [rounded(path.vertices) for path in one.get_paths()],
                "values": rounded([] if one.get_array() is None else one.get_array()),
            }
            for one in axes.collections
        ],
        "images": [rounded(image.get_array()) for image in axes.images],
        "texts": [[text.get_text(), rounded(getattr(text, "xy", text.get_position()))] for text in axes.texts],
    }


def as_text(shown: dict[str, Any]) -> str | None:
    """The Markdown or HTML of something displayed; a figure becomes its alternative text."""
    text = shown.get("text/markdown") or shown.get("text/html")
    return text and re.sub(r'<svg[^>]*?aria-label="([^"]*)".*?</svg>', r"figure: \1", text, flags=re.DOTALL)


def cells_of(page: Path) -> Iterator[tuple[str, str]]:
    """The code of each cell of a page, and the name of the figure that the cell makes."""
    from myst_nb.core.read import read_myst_markdown_notebook

    text = page.read_text(encoding="utf-8")
    book = nbformat.reads(text, 4) if page.suffix == ".ipynb" else read_myst_markdown_notebook(text)
    for cell in book.cells:
        if cell.cell_type == "code":
            yield cell.source, cell.metadata.get("mystnb", {}).get("figure", {}).get("name", "unnamed")


def run_page(page: Path) -> dict[str, Any]:
    """Runs a page in this process. Returns its figures, glued values and tables."""
    import matplotlib
    import myst_nb
    from IPython.core.displaypub import DisplayPublisher
    from IPython.core.interactiveshell import InteractiveShell
    from matplotlib import pyplot
    from matplotlib.backend_bases import FigureCanvasBase

    figures: dict[str, Any] = {}
    glued: dict[str, Any] = {}
    tables: list[str] = []
    drawn: list[Any] = []  # in the cell that runs
    print_figure = FigureCanvasBase.print_figure

    def draw(canvas: Any, *arguments: Any, **options: Any) -> Any:
        drawn.append(canvas.figure)
        return print_figure(canvas, *arguments, **options)

    class Publisher(DisplayPublisher):
        def publish(self, data: dict[str, Any], *arguments: Any, **options: Any) -> None:
            tables.extend(filter(None, [as_text(data)]))

    def glue(name: str, value: Any, display: bool = True) -> None:
        is_number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
        glued[name] = rounded(value) if is_number else as_text(shell.display_formatter.format(value)[0]) or repr(value)

    FigureCanvasBase.print_figure = draw  # every way to save or show a figure comes through here
    myst_nb.glue = glue
    matplotlib.use("Agg")
    os.chdir(page.parent)
    sys.path.insert(0, "")  # as in a kernel
    shell = InteractiveShell.instance(display_pub_class=Publisher)
    for place, (source, name) in enumerate(cells_of(page)):
        result = shell.run_cell(source)
        result.raise_error()
        if result.result is not None:
            tables.extend(filter(None, [as_text(shell.display_formatter.format(result.result)[0])]))
        drawn += map(pyplot.figure, pyplot.get_fignums())
        for figure in dict.fromkeys(drawn):
            key = name if name not in figures else f"{name}+{len(figures)}"
            figures[key] = [data_of(axes) for axes in figure.axes]
        pyplot.close("all")
        drawn.clear()
        print(f"{page.name}: cell {place} done, {len(figures)} figures so far", file=sys.stderr)
    return {"figures": figures, "glue": glued, "tables": tables}


def differences(old: Any, new: Any, place: str) -> Iterator[str]:
    """One line for each place where what was captured differs."""
    if any(re.search(pattern, place) for pattern in IGNORED):
        return
    numbers = isinstance(old, int | float) and isinstance(new, int | float)
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            yield from differences(old.get(key, "nothing"), new.get(key, "nothing"), f"{place}/{key}")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, pair in enumerate(zip(old, new, strict=True)):
            yield from differences(*pair, f"{place}/{index}")
    elif isinstance(old, str) and isinstance(new, str) and old != new and "\n" in old + new:
        lines = [line for line in difflib.ndiff(old.splitlines(), new.splitlines()) if line[0] in "+-"]
        yield f"{place}:\n    " + "\n    ".join(line[:400] for line in lines)
    elif old != new and not (numbers and math.isclose(old, new, rel_tol=TOLERANCE, abs_tol=1e-9)):
        yield f"{place}: {str(old)[:400]!r} -> {str(new)[:400]!r}"


def compare(old: Path, new: Path) -> int:
    """Prints the differences between two folders. Returns 1 if there are any, else 0."""
    found = False
    for name in sorted({path.stem for folder in (old, new) for path in folder.glob("*.json")}):
        files = [folder / f"{name}.json" for folder in (old, new)]
        missing = [f"{file} does not exist" for file in files if not file.exists()]
        lines = missing or list(differences(*(json.loads(file.read_text(encoding="utf-8")) for file in files), name))
        print(f"{name}: {len(lines)} differences", *lines, sep="\n  ")
        found |= bool(lines)
    return int(found)


def run(out: Path, names: list[str], tree: Path) -> int:
    """Runs pages of a checkout, those that only read records first. Returns how many failed."""
    texts = [page for page in sorted(tree.glob("book/*.md")) if "{code-cell}" in page.read_text(encoding="utf-8")]
    pages = [*texts, *sorted(tree.glob("notebooks/1*.ipynb")), *sorted(tree.glob("notebooks/0*.ipynb"))]
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    out.mkdir(parents=True, exist_ok=True)
    failed = 0
    for page in pages:
        if not names or page.name.startswith(tuple(names)):
            command = [sys.executable, __file__, "page", str(out / f"{page.stem}.json"), str(page)]
            code = subprocess.run(command, env=environment | {"HF_HUB_OFFLINE": "1"}, check=False).returncode
            print(page.name, "failed" if code else "done", flush=True)
            failed += code != 0
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "compare", "page"))
    parser.add_argument("paths", nargs="+", help="OUT and the starts of pages' names, or OLD and NEW")
    parser.add_argument("--tree", type=Path, default=Path(__file__).parents[2], help="default: this checkout")
    chosen = parser.parse_args()
    first, *others = chosen.paths
    if chosen.action == "compare":
        return compare(Path(first), Path(*others))
    if chosen.action == "run":
        return run(Path(first).resolve(), others, chosen.tree.resolve())
    found = run_page(Path(*others))  # in a process that run() started
    Path(first).write_text(json.dumps(found, indent=1, ensure_ascii=False), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
