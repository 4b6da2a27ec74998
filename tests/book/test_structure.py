"""What the page on the library's structure shows is what the code says."""

import ast
import doctest
import sys

import pytest
import torch

pytest.importorskip("grimp")
pytest.importorskip("matplotlib")

from book import structure
from tinylora_lite import grpo_advantages
from tinylora_lite.adapter import tying

STEP = {
    "training.grpo": {"training.loop", "training.losses", "sampling.sampler"},
    "training.loop": {"sampling.sampler", "adapter.adapter"},
    "training.losses": set(),
    "sampling.sampler": {"adapter.adapter"},
    "adapter.adapter": set(),
}
CALLED = ["adapter.adapter", "training.grpo", "training.loop", "nano.task", "training.losses"]


def runtime_imports(tree: ast.AST):
    """The import statements of a file, inside functions too, less those for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tinylora_lite."):
            yield node
        yield from runtime_imports(node)


def test_every_import_statement_is_an_arrow():
    arrows = structure.imports()
    assert len(arrows) > 50
    for name, targets in arrows.items():
        path = structure.PACKAGE.joinpath(*name.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        expected = set()
        for node in runtime_imports(ast.parse(path.read_text(encoding="utf-8"))):
            module = node.module.removeprefix("tinylora_lite.")
            inner = {f"{module}.{alias.name}" for alias in node.names} & arrows.keys()
            expected |= inner
            expected |= {module} if len(inner) < len(node.names) else set()
        assert expected - {name} <= targets, name


def test_worked_examples():
    assert doctest.testmod(structure) == (0, 2)


def test_a_circle_is_an_error_that_names_it():
    with pytest.raises(ValueError, match=r"in a circle: (a -> b -> a|b -> a -> b)"):
        structure.levels({"a": {"b"}, "b": {"a"}})


def test_rooms_are_the_folders_of_the_package():
    folders = {path.parent.name for path in structure.PACKAGE.glob("*/__init__.py")}
    assert structure.by_room(structure.imports()).keys() == folders
    assert all(structure.purpose(room).endswith((".", ")")) for room in folders)


def test_by_room_leaves_a_room_s_own_imports_out():
    assert structure.by_room(STEP) == {
        "training": {"sampling", "adapter"},
        "sampling": {"adapter"},
        "adapter": set(),
    }


def test_closure_is_all_that_is_imported_directly_or_not():
    whole = structure.closure("training.grpo")
    assert {"training.grpo", "training.losses", "adapter.adapter", "sampling.rollouts", "utils.record"} <= whole.keys()
    assert all(targets <= whole.keys() for targets in whole.values())
    part = structure.closure("training.grpo", without="utils")
    assert part.keys() == {name for name in whole if not name.startswith("utils.")}


def test_reduced_arrows_reach_as_far():
    def reach(arrows, name):
        return {name}.union(*(reach(arrows, each) for each in arrows[name]))

    direct = structure.reduced(STEP)
    assert direct["training.grpo"] == {"training.loop", "training.losses"}
    assert all(reach(direct, name) == reach(STEP, name) for name in STEP)


class TestCalls:
    def test_they_come_in_the_order_of_their_first_call(self):
        def work():
            grpo_advantages(torch.tensor([[0.0, 1.0]]))
            tying.groups_of([], "all", "tiled")
            grpo_advantages(torch.tensor([[0.0, 1.0]]))

        found = structure.calls(work)
        assert list(found) == ["training.losses", "adapter.tying"]
        assert found["training.losses"] == "grpo_advantages"

    def test_an_error_ends_the_watch(self):
        before, times = sys.getprofile(), []

        def work():
            times.append(1)
            if len(times) == 2:
                raise KeyError

        with pytest.raises(KeyError):
            structure.calls(work)
        assert sys.getprofile() is before


def test_the_matrix_has_a_square_below_the_diagonal_for_each_import():
    arrows = structure.by_room(STEP)
    axes = structure.matrix(arrows).axes[0]
    rows = [text.get_text() for text in axes.get_yticklabels()]
    assert rows == [text.get_text() for text in axes.get_xticklabels()] == ["adapter", "sampling", "training"]
    filled = [patch for patch in axes.patches if patch.get_width() < 1]
    centres = [(patch.get_x() + 0.4, patch.get_y() + 0.4) for patch in filled]
    assert {(rows[round(y)], rows[round(x)]) for x, y in centres} == {(a, b) for a in arrows for b in arrows[a]}
    assert all(x < y for x, y in centres)


class TestWay:
    @pytest.fixture
    def axes(self):
        return structure.way(STEP, CALLED).axes[0]

    @pytest.fixture
    def places(self, axes):
        boxes = [text for text in axes.texts if text.get_bbox_patch() is not None and text.get_text()]
        return {text.get_text(): text.get_position() for text in boxes}

    def test_files_come_in_the_order_of_the_calls_and_the_others_after_them(self, axes, places):
        assert sorted(places, key=lambda name: places[name][1]) == ["adapter", "grpo", "loop", "losses", "sampler"]
        dotted = {t.get_text() for t in axes.texts if t.get_bbox_patch() and t.get_bbox_patch().get_linestyle() == ":"}
        assert dotted == {"sampler"}

    def test_a_column_is_a_room(self, axes, places):
        heads = {text.get_text(): text.get_position()[0] for text in axes.texts if text.get_weight() == "bold"}
        assert heads == {"adapter": 0, "sampling": 1, "training": 2}
        for name in STEP:
            room, _, file = name.partition(".")
            assert places[file][0] == heads[room]

    def test_arrows_are_the_reduced_imports_and_none_points_to_the_right(self, axes, places):
        named = {place: name for name, place in places.items()}
        drawn = {(named[note.xyann], named[note.xy]) for note in axes.texts if getattr(note, "arrow_patch", None)}
        expected = {(a.split(".")[1], b.split(".")[1]) for a, bs in structure.reduced(STEP).items() for b in bs}
        assert drawn == expected
        assert all(places[b][0] <= places[a][0] for a, b in drawn)


def test_the_page_s_figures_can_be_drawn():
    """They cannot where rooms import one another in a circle."""
    assert structure.matrix(structure.by_room(structure.imports())).axes
    assert structure.way(structure.closure("training.grpo", without="utils"), []).axes
