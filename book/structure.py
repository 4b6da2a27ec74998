"""The library's own structure, read from its code: which room imports which, and which files a call goes through."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Mapping, Sequence, Set
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from types import FrameType

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from tinylora_lite.view.plot import BLACK, INK, WIDTH, style

PACKAGE = Path(__file__).parents[1] / "tinylora_lite"
PAPER = "#d9d9d6"
"""The ground of a box: opaque, so that lines pass behind it, and light enough for black letters on any page."""

Imports = Mapping[str, Set[str]]


@cache
def imports() -> Imports:
    """Which modules each module of a room imports, inside functions too: ``{"training.grpo": {"training.losses"}}``.

    What is imported for type checkers alone does not count.
    """
    import grimp

    graph = grimp.build_graph(PACKAGE.name, exclude_type_checking_imports=True, cache_dir=None)
    outside = {PACKAGE.name, f"{PACKAGE.name}.__main__"}
    inside = {name: name.removeprefix(f"{PACKAGE.name}.") for name in graph.modules - outside}
    return {
        short: {inside[each] for each in graph.find_modules_directly_imported_by(name) if each in inside}
        for name, short in inside.items()
    }


def room(name: str) -> str:
    """The room of a module: the package right below the library's own."""
    return name.partition(".")[0]


def by_room(arrows: Imports) -> Imports:
    """Which rooms the modules of each room import, their own left out."""
    found: dict[str, set[str]] = {room(name): set() for name in arrows}
    for name, targets in arrows.items():
        found[room(name)] |= {room(each) for each in targets} - {room(name)}
    return found


def levels(arrows: Imports) -> dict[str, int]:
    """How many imports, at most, lead from each name down to one that imports nothing.

    >>> levels({"a": {"b", "c"}, "b": {"c"}, "c": set()})
    {'c': 0, 'b': 1, 'a': 2}

    Raises:
        ValueError: the imports go in a circle.
    """
    found: dict[str, int] = {}
    try:
        for name in TopologicalSorter(arrows).static_order():
            found[name] = max((found[each] + 1 for each in arrows[name]), default=0)
    except CycleError as error:
        raise ValueError(f"these import one another in a circle: {' -> '.join(error.args[1])}") from error
    return found


def closure(name: str, without: str = "") -> Imports:
    """A module and all that it imports, directly or not, less the modules of the room ``without``."""
    found: dict[str, Set[str]] = {}
    waiting = [name]
    while waiting:
        each = waiting.pop()
        if each not in found:
            found[each] = {target for target in imports()[each] if room(target) != without}
            waiting += found[each]
    return found


def reduced(arrows: Imports) -> dict[str, set[str]]:
    """The arrows without those that follow from others: from a to c, where others lead from a over b to c.

    >>> {name: sorted(each) for name, each in reduced({"a": {"b", "c"}, "b": {"c"}, "c": set()}).items()}
    {'c': [], 'b': ['c'], 'a': ['b']}
    """
    below: dict[str, set[str]] = {}
    for name in levels(arrows):
        below[name] = set(arrows[name]).union(*(below[each] for each in arrows[name]))
    return {name: set(arrows[name]) - set().union(*(below[each] for each in arrows[name])) for name in below}


def calls(work: Callable[[], object]) -> dict[str, str]:
    """The modules that ``work`` goes through, in the order in which it first gets to each, with the function it calls.

    It is done twice and the second time is looked at, since the first one also imports.
    """
    found: dict[str, str] = {}

    def note(frame: FrameType, event: str, argument: object) -> None:
        module, function = frame.f_globals.get("__name__", ""), frame.f_code.co_qualname
        if (
            event == "call"
            and module.startswith(f"{PACKAGE.name}.")
            and not function.startswith(("<", "__create_fn__"))
        ):
            found.setdefault(module.removeprefix(f"{PACKAGE.name}."), function)

    work()
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return found


def purpose(name: str) -> str:
    """The first sentence of a module's or a room's docstring."""
    path = PACKAGE.joinpath(*name.split("."))
    text = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8")
    return " ".join((ast.get_docstring(ast.parse(text)) or "").partition("\n\n")[0].split())


@style()
def matrix(arrows: Imports) -> Figure:
    """A square for each import: rows import columns, both in the order in which they build on one another."""
    depth = levels(arrows)
    names = sorted(depth, key=lambda name: (depth[name], name))
    drawn = Figure(figsize=(WIDTH, WIDTH))
    axes = drawn.subplots()
    for row, name in enumerate(names):
        axes.add_patch(Rectangle((row - 0.5, row - 0.5), 1, 1, fc=(INK, 0.15), lw=0))
        for column in sorted(names.index(each) for each in arrows[name]):
            axes.add_patch(Rectangle((column - 0.4, row - 0.4), 0.8, 0.8, fc=(INK, 0.75), lw=0))
    axes.set(xlim=(-0.5, len(names) - 0.5), ylim=(len(names) - 0.5, -0.5), aspect="equal")
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.spines["bottom"].set_visible(False)
    axes.grid(visible=True, axis="both", lw=0.5)
    axes.set_axisbelow(True)
    return drawn


@style()
def way(arrows: Imports, order: Sequence[str]) -> Figure:
    """The files of a call from above to below in the order in which it gets to them, in a column for each room.

    An arrow is an import; those that follow from others are left out.

    Args:
        arrows: which modules each module imports, as :func:`closure` has them.
        order: the modules that the call goes through, as :func:`calls` has them. Those of ``arrows`` that are not
            called follow, with a dashed edge.
    """
    called = [name for name in order if name in arrows]
    depth = levels(arrows)
    names = called + sorted(arrows.keys() - set(called), key=lambda name: (-depth[name], name))
    outer = levels(by_room(arrows))
    columns = sorted(outer, key=lambda name: (outer[name], name))
    places = {name: (columns.index(room(name)), row) for row, name in enumerate(names)}
    drawn = Figure(figsize=(WIDTH, 0.6 + 0.3 * len(names)))
    axes = drawn.subplots()
    axes.set(xlim=(-0.6, len(columns) - 0.4), ylim=(len(names) - 0.4, -1.3))
    axes.axis("off")
    for x, name in enumerate(columns):
        axes.plot([x, x], [-0.6, len(names) - 0.5], color=INK, lw=0.5, alpha=0.2, zorder=0)
        axes.text(x, -1, name, ha="center", va="center", size=9, weight="bold")
    for name, (x, y) in places.items():
        box = {"boxstyle": "round,pad=0.3", "fc": PAPER, "ec": INK, "lw": 0.6, "ls": "-" if name in called else ":"}
        text = name.partition(".")[2]
        axes.text(x, y, text, ha="center", va="center", size=8, color=BLACK, bbox=box, zorder=2)
    for name, targets in sorted(reduced(arrows).items()):
        for target in sorted(targets):
            (x, y), (to_x, to_y) = places[name], places[target]
            rows = abs(to_y - y)
            bend = -0.12 if x != to_x else 0.0 if rows == 1 else -min(0.4, 2 / rows)  # past the files between
            line = {"arrowstyle": "-|>,head_width=0.15,head_length=0.3", "color": (INK, 0.6), "lw": 0.8}
            line |= {"shrinkA": 7, "shrinkB": 9, "connectionstyle": f"arc3,rad={bend}"}
            axes.annotate("", (to_x, to_y), (x, y), arrowprops=line, zorder=1)
    return drawn
