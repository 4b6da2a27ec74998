"""Which modules are found, in which order, and which share a vector."""

import doctest
from collections import Counter
from itertools import pairwise

import pytest
import torch
from torch import nn

from tinylora_lite.adapter import tying
from tinylora_lite.adapter.tying import MODULE_TYPES, TargetModule, find_target_modules, groups_of


def network(layers, types=7):
    return [TargetModule(layer, kind, f"{layer}.{kind}") for layer in range(layers) for kind in range(types)]


def test_worked_examples():
    assert doctest.testmod(tying).attempted == 3
    assert doctest.testmod(tying).failed == 0


@pytest.mark.parametrize("layers", [1, 2, 5, 28, 36])
@pytest.mark.parametrize("n_tie", [1, 2, 3, 7, 8, 16, 100, 1000])
def test_tiled_runs_are_consecutive_balanced_and_as_many_as_the_formula_says(layers, n_tie):
    targets = network(layers)
    groups = groups_of(targets, n_tie, "tiled")
    assert all(after - before in (0, 1) for before, after in pairwise(groups))
    sizes = Counter(groups)
    assert sorted(sizes) == list(range(-(-len(targets) // n_tie)))
    assert max(sizes.values()) <= n_tie
    assert max(sizes.values()) - min(sizes.values()) <= 1


@pytest.mark.parametrize("layers", [1, 2, 5, 28, 36])
@pytest.mark.parametrize("n_tie", [1, 2, 3, 8, 16, 36, 1000])
def test_structured_runs_keep_types_apart_and_are_balanced_over_layers(layers, n_tie):
    targets = network(layers)
    groups = groups_of(targets, n_tie, "structured")
    members = {group: [s for s, g in zip(targets, groups, strict=True) if g == group] for group in groups}
    assert list(members) == list(range(7 * -(-layers // n_tie)))
    for sharing in members.values():
        assert len({target.type_index for target in sharing}) == 1
        assert all(b.layer - a.layer == 1 for a, b in pairwise(sharing))
    sizes = [len(sharing) for sharing in members.values()]
    assert max(sizes) <= n_tie
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("tying", ["tiled", "structured"])
def test_the_ends_of_the_scale(tying):
    targets = network(4)
    assert groups_of(targets, 1, tying) == list(range(28))
    assert groups_of(targets, "all", tying) == [0] * 28


def test_full_structured_tying_is_one_group_for_each_type():
    assert groups_of(network(3), 3, "structured") == list(range(7)) * 3


def test_structured_where_layers_lack_types_or_hold_one_twice():
    targets = [
        TargetModule(0, 0, "a"),
        TargetModule(0, 6, "b"),
        TargetModule(0, 6, "c"),
        TargetModule(1, 6, "d"),
        TargetModule(1, 6, "e"),
        TargetModule(2, 0, "f"),
    ]
    assert groups_of(targets, 2, "structured") == [0, 1, 1, 2, 2, 0]


class Block(nn.Module):
    """Its layers stand in another order than tying counts them."""

    def __init__(self, **more: nn.Module) -> None:
        super().__init__()
        self.mlp, self.self_attn = nn.Module(), nn.Module()
        for name in reversed(MODULE_TYPES[4:]):
            setattr(self.mlp, name, nn.Linear(2, 2))
        for name in reversed(MODULE_TYPES[:4]):
            setattr(self.self_attn, name, nn.Linear(2, 2))
        for name, module in more.items():
            setattr(self, name, module)


def test_the_order_is_layer_by_layer_and_qkvo_gate_up_down_inside():
    model = nn.Module()
    model.layers = nn.ModuleList(Block() for _ in range(12))
    model.lm_head = nn.Linear(2, 2)
    targets = find_target_modules(model)
    parts = ["self_attn"] * 4 + ["mlp"] * 3
    wanted = [f"layers.{i}.{part}.{kind}" for i in range(12) for part, kind in zip(parts, MODULE_TYPES, strict=True)]
    assert [target.name for target in targets] == wanted
    assert [(target.layer, target.type_index) for target in targets] == [
        (i, kind) for i in range(12) for kind in range(7)
    ]
    assert [target.name for target in find_target_modules(model, ["lm_head", "down_proj", "q_proj"])][-3:] == [
        "layers.11.self_attn.q_proj",
        "layers.11.mlp.down_proj",
        "lm_head",
    ]


def test_blocks_and_experts_keep_their_order_past_nine_and_towers_stay_apart():
    model = nn.Module()
    model.vision, model.text = nn.Module(), nn.Module()
    model.vision.blocks = nn.ModuleList(Block() for _ in range(2))
    model.text.layers = nn.ModuleList(Block(experts=nn.ModuleList(Block() for _ in range(11))) for _ in range(2))
    names = [target.name for target in find_target_modules(model, ["up_proj"])]
    assert names[:2] == ["vision.blocks.0.mlp.up_proj", "vision.blocks.1.mlp.up_proj"]
    assert names[2:14] == ["text.layers.0.mlp.up_proj", *(f"text.layers.0.experts.{i}.mlp.up_proj" for i in range(11))]


def test_targets_by_full_name_by_last_parts_and_more_than_once():
    model = nn.Module()
    model.layers = nn.ModuleList(Block() for _ in range(2))
    everything = ["self_attn.q_proj", "q_proj", "layers.1.self_attn.q_proj", "layers.0.mlp.up_proj", "q_proj"]
    assert [target.name for target in find_target_modules(model, everything)] == [
        "layers.0.self_attn.q_proj",
        "layers.0.mlp.up_proj",
        "layers.1.self_attn.q_proj",
    ]


def test_a_name_is_not_a_piece_of_a_name():
    model = nn.Module()
    model.my_q_proj = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="no linear layer named q_proj"):
        find_target_modules(model, ["q_proj"])


def test_no_weight_is_read():
    with torch.device("meta"):
        model = nn.Sequential(Block(), Block())
    assert len(find_target_modules(model)) == 14


@pytest.mark.parametrize("targets", [["up_proj", "c_attn"], ["mlp"], ["layers.7.mlp.up_proj"]])
def test_an_unknown_target_names_itself_and_what_there_is(targets):
    model = nn.Module()
    model.layers = nn.ModuleList([Block()])
    unknown = targets[-1]
    with pytest.raises(
        ValueError, match=f"^no linear layer named {unknown} in Module; set target_modules to .*up_proj"
    ):
        find_target_modules(model, targets)


class QuantLinear(nn.Module):
    """A stand-in for the layers of quantization libraries, which are no ``nn.Linear``."""


@pytest.mark.parametrize("targets", [None, ["up_proj"]])
def test_a_quantized_layer_is_named(targets):
    model = nn.Module()
    model.layers = nn.ModuleList([Block()])
    model.layers[0].mlp.up_proj = QuantLinear()
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj is a QuantLinear .* load the model without quant"):
        find_target_modules(model, targets)
    model.layers[0].mlp.up_proj.base_layer = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="no linear layer named up_proj"):
        find_target_modules(model, ["up_proj"])


def test_models_without_the_seven_types():
    with pytest.raises(ValueError, match=r"named q_proj, .* in Sequential; set target_modules to some of: 0, 1$"):
        find_target_modules(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"it has no torch\.nn\.Linear at all$"):
        find_target_modules(nn.Sequential(nn.ReLU()))
