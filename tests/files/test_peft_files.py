"""PEFT's own reader and writer judge ours: same outputs, same bytes, and what does not fit is refused.

Runs with the PEFT that is installed, 0.20.0 or newer.
"""

import copy
import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import tinylora_lite as tl
from tinylora_lite.adapter.attached import adapter_of
from tinylora_lite.adapter.tying import MODULE_TYPES

peft = pytest.importorskip("peft", minversion="0.20")

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TOKENS = torch.arange(2, 18).reshape(2, 8)
# Of 14 modules: 14, 13, 10, 10, 7, 6, 1 and 1 groups; those of 13, 10 and 6 are uneven, 10.5 rounds to the even 10.
RATIOS = (0.0, 0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)


def _in_peft(model, adapter_name="default", **settings):
    """PEFT's adapter on a copy of a model, with random numbers in place of the zeros."""
    settings = {"u": 3, "target_modules": list(MODULE_TYPES)} | settings
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.TinyLoraConfig(**settings), adapter_name=adapter_name)
    _randomise(theirs.base_model.tinylora_v[adapter_name].values())
    return theirs.eval()


def _randomise(vectors):
    with torch.no_grad():
        for seed, vector in enumerate(vectors):
            vector.copy_(0.3 * torch.randn(vector.shape, generator=torch.Generator().manual_seed(seed)))


def _loaded(model, folder):
    """What PEFT makes of a folder; a missing or unexpected key, like any warning, is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder)
        loading = theirs.load_adapter(folder, adapter_name="again")
    assert loading.missing_keys == []
    assert loading.unexpected_keys == []
    return theirs


@torch.no_grad()
def _logits(model):
    return model(TOKENS).logits


def _edit(folder, tensors=None, **settings):
    if tensors is not None:
        stored = load_file(folder / TENSORS)
        tensors(stored)
        save_file(stored, folder / TENSORS)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    (folder / CONFIG).write_text(json.dumps(config | settings), encoding="utf-8")


def _refused(model, folder, match):
    """Refused, and the model untouched."""
    before = _logits(model)
    with pytest.raises(tl.AdapterFileError, match=match):
        tl.import_peft(model, folder)
    assert adapter_of(model) is None
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(_logits(model), before)


@pytest.fixture
def folder(model, tmp_path):
    """A folder of PEFT's for ``model``, with ten groups of which the last holds five modules."""
    _in_peft(model, weight_tying=0.3).save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_import_computes_bit_for_bit_what_peft_does(make_model, architecture, dtype, tmp_path):
    model = make_model(architecture).to(dtype)
    base = _logits(model)
    for ratio in RATIOS:
        for with_p in (True, False):
            theirs = _in_peft(model, weight_tying=ratio, save_projection=with_p, projection_seed=11)
            folder = tmp_path / f"{ratio} {with_p}"
            theirs.save_pretrained(folder)
            adapter = tl.import_peft(model, folder)
            case = f"weight_tying={ratio}, P {'saved' if with_p else 'not saved'}"
            assert torch.equal(_logits(model), _logits(theirs)), case
            vectors = torch.stack(list(theirs.base_model.tinylora_v["default"].values()))
            assert torch.equal(adapter.vectors, vectors), case
            adapter.detach()
            assert (_logits(theirs) - base).norm() > 0.05 * base.norm()
            # And back: the same file, byte for byte.
            tl.export_peft(adapter, tmp_path / "back")
            back, stored = load_file(tmp_path / "back" / TENSORS), load_file(folder / TENSORS)
            if with_p:
                assert (tmp_path / "back" / TENSORS).read_bytes() == (folder / TENSORS).read_bytes(), case
            else:
                assert {key for key in back if key not in stored} == {key for key in back if key.endswith("_P")}, case
                assert all(torch.equal(back[key], stored[key]) for key in stored), case
            ours, stored = (json.loads((f / CONFIG).read_text(encoding="utf-8")) for f in (tmp_path / "back", folder))
            assert ours.keys() <= stored.keys()
            assert {key for key in ours if ours[key] != stored[key]} <= {
                "base_model_name_or_path",
                "peft_version",
                "target_modules",
                "task_type",
                "weight_tying",
            }
            assert set(ours["target_modules"]) == set(stored["target_modules"])
            if ratio == 0.3:
                assert torch.equal(_logits(_loaded(model, tmp_path / "back")), _logits(theirs)), case


def _basis(model):
    names = [name for name, _ in model.named_modules() if name.endswith(MODULE_TYPES)]
    directions = torch.randn(4, len(names), 2, 2, generator=torch.Generator().manual_seed(3))
    return tl.Basis(directions, tuple(names), sigma="right")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["paper", "split", "lora_xs", "calibrated", "tied", "tied by groups", "some modules"])
def test_export_computes_in_peft_what_it_computes_here(make_model, kind, dtype, tmp_path):
    model = make_model().to(dtype)
    settings = {
        "paper": {"u": 2, "n_tie": 7},
        "split": {"u": 3, "sigma": "split", "seed": 2**64 - 1},
        "lora_xs": {"u": 4, "sigma": "right", "projection": "identity"},
        "calibrated": {"u": 3, "n_tie": "all", "sigma": "right", "projection": _basis(model)},
        "tied": {"rank": 4, "n_tie": 2, "tying": "tiled"},
        "tied by groups": {"groups": [0] * 4 + [2] * 4 + [1] * 6},
        "some modules": {"target_modules": ["lm_head", "layers.1.mlp.up_proj", "q_proj"], "n_tie": 2},
    }[kind]
    for arithmetic in ("float32", "model"):
        adapter = tl.attach(model, tl.TinyLoraConfig(**settings, arithmetic=arithmetic))
        _randomise(adapter.vectors)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert tl.export_peft(adapter, tmp_path / kind) == tmp_path / kind
        ours = _logits(model)
        adapter.detach()
        base = _logits(model)
        theirs = _loaded(model, tmp_path / kind)
        assert (ours - base).norm() > 0.02 * base.norm()
        if arithmetic == "float32" or dtype == torch.float32:
            assert torch.equal(ours, _logits(theirs)), "bit for bit"
        else:
            assert (ours - _logits(theirs)).norm() < 2e-2 * ours.norm(), "up to the rounding of bfloat16"
        assert len(theirs.base_model.tinylora_v["default"]) == len(adapter.vectors), "and as few numbers train"
        assert theirs.peft_config["default"].task_type == "CAUSAL_LM"


@pytest.mark.parametrize(
    ("settings", "vectors"),
    [
        ({"n_tie": 2, "tying": "structured"}, 14),
        ({"n_tie": 5}, 14),  # 5, 5 and 4
        ({"groups": [0] * 4 + [1] * 10}, 14),
    ],
)
def test_groups_that_no_ratio_gives_go_out_as_finer_ones(model, settings, vectors, tmp_path):
    adapter = tl.attach(model, tl.TinyLoraConfig(u=2, **settings))
    _randomise(adapter.vectors)
    ours = _logits(model)
    with pytest.warns(UserWarning, match=f"holds its {len(adapter.vectors)} vectors as {vectors}, many of them"):
        tl.export_peft(adapter, tmp_path / "out")
    adapter.detach()
    theirs = _loaded(model, tmp_path / "out")
    assert torch.equal(_logits(theirs), ours)
    assert len(theirs.base_model.tinylora_v["default"]) == vectors


def test_training_goes_on_here_where_peft_stopped(model, tmp_path):
    theirs = _in_peft(model, weight_tying=0.6).train()

    def train(module, parameters, steps):
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        for _ in range(steps):
            module(TOKENS, labels=TOKENS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    vectors = list(theirs.base_model.tinylora_v["default"].values())
    before = [vector.detach().clone() for vector in vectors]
    train(theirs, vectors, 3)
    theirs.save_pretrained(tmp_path / "half way")
    adapter = tl.import_peft(model, tmp_path / "half way")
    assert all((old - new).abs().min() > 1e-3 for old, new in zip(before, adapter.vectors.detach(), strict=True))
    train(theirs, vectors, 3)
    train(model, [adapter.vectors], 3)
    torch.testing.assert_close(adapter.vectors.detach(), torch.stack(vectors).detach(), rtol=0, atol=1e-6)
    tl.export_peft(adapter, tmp_path / "done")
    ours = _logits(model)
    adapter.detach()
    assert torch.equal(_logits(_loaded(model, tmp_path / "done")), ours)


def test_an_imported_adapter_is_saved_and_loaded_like_any_other(model, folder, tmp_path):
    adapter = tl.import_peft(model, folder)
    ours = _logits(model)
    tl.save(adapter, tmp_path / "a.tinylora", dtype="fp32")
    adapter.detach()
    again = tl.load(model, tmp_path / "a.tinylora")
    assert torch.equal(_logits(model), ours)
    tl.export_peft(again, tmp_path / "back")
    assert (tmp_path / "back" / TENSORS).read_bytes() == (folder / TENSORS).read_bytes()


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": r".*layers\.1\.(mlp|self_attn)\.(down|q|k)_proj"},
        {"target_modules": "all-linear", "weight_tying": 0.2},
        {"target_modules": ["q_proj", "model.layers.1.mlp.down_proj", "lm_head"], "weight_tying": 0.4},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1},
        {"target_modules": ["q_proj", "model.layers.1.mlp.down_proj"], "layers_to_transform": 0},
        {"target_modules": ["v_proj", "mlp.gate_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
        {"target_modules": ["v_proj"], "r": 3, "u": 1},
        {"tinylora_dropout": 0.0, "fan_in_fan_out": True},
    ],
    ids=str,
)
def test_modules_are_those_that_peft_takes(model, settings, tmp_path):
    theirs = _in_peft(model, **settings)
    theirs.save_pretrained(tmp_path / "theirs")
    adapter = tl.import_peft(model, tmp_path / "theirs")
    assert set(adapter.names) == set(theirs.targeted_module_names)
    assert torch.equal(_logits(model), _logits(theirs))


def test_modules_in_an_order_of_their_own(tmp_path):
    """The model holds its modules in another order than tying counts them; PEFT's P and groups follow the model."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.down_proj, self.v_proj, self.q_proj = (nn.Linear(6, 6) for _ in range(3))

        def forward(self, x):
            return x + self.down_proj(torch.tanh(self.v_proj(x) * self.q_proj(x)))

    torch.manual_seed(0)
    base, x = nn.Sequential(*(Block() for _ in range(3))), torch.randn(2, 6)
    theirs = _in_peft(base, target_modules=["q_proj", "v_proj", "down_proj"], weight_tying=0.5, save_projection=False)
    theirs.save_pretrained(tmp_path / "theirs")
    adapter = tl.import_peft(base, tmp_path / "theirs")
    # PEFT: 0 0 1 | 1 2 2 | 3 3 3 in the model's order, so backwards in each block here.
    assert adapter.groups == (1, 0, 0, 2, 2, 1, 3, 3, 3)
    assert [name.rpartition(".")[2] for name in adapter.names[:3]] == ["q_proj", "v_proj", "down_proj"]
    assert torch.equal(base(x), theirs(x))
    tl.export_peft(adapter, tmp_path / "ours")
    ours = base(x)
    adapter.detach()
    assert torch.equal(_loaded(base, tmp_path / "ours")(x), ours)


def test_modules_whose_names_end_like_those_of_others(tmp_path):
    """No list of names stands for a module whose whole name ends another's; a regular expression does."""

    class Twins(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj = nn.Linear(6, 6)
            self.tower = nn.ModuleDict({"q_proj": nn.Linear(6, 6)})

        def forward(self, x):
            return self.tower["q_proj"](torch.tanh(self.q_proj(x)))

    torch.manual_seed(0)
    base, x = Twins(), torch.randn(2, 6)
    adapter = tl.attach(base, tl.TinyLoraConfig(target_modules=["tower.q_proj"]))
    _randomise(adapter.vectors)
    tl.export_peft(adapter, tmp_path / "one")
    ours = base(x)
    adapter.detach()
    assert torch.equal(_loaded(base, tmp_path / "one")(x), ours)
    _in_peft(base, target_modules="q_proj").save_pretrained(tmp_path / "outer")
    with pytest.raises(tl.AdapterFileError, match="no list of names means exactly its modules q_proj"):
        tl.import_peft(base, tmp_path / "outer")


def test_adapters_with_names_of_their_own(model, tmp_path):
    theirs = _in_peft(model, adapter_name="math", weight_tying=0.4)
    theirs.add_adapter("code", peft.TinyLoraConfig(r=3, u=2, weight_tying=0.6, target_modules=["up_proj", "k_proj"]))
    _randomise(theirs.base_model.tinylora_v["code"].values())
    theirs.save_pretrained(tmp_path)
    for name, modules in (("math", 14), ("code", 4)):
        theirs.set_adapter(name)
        adapter = tl.import_peft(model, tmp_path / name)
        assert len(adapter.names) == modules
        assert torch.equal(_logits(model), _logits(theirs))
        adapter.detach()
    _refused(model, tmp_path, "holds no adapter_config.json; its subfolders code, math do")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"bias": "all"}, "was trained with bias='all', and no adapter here can hold biases of the base"),
        ({"modules_to_save": ["lm_head"]}, "holds a lm_head.weight of its own, which differs from the model's"),
        (
            {"target_modules": ["q_proj", "embed_tokens"]},
            "it adapts model.embed_tokens, a Embedding; adapters here take",
        ),
    ],
)
def test_what_peft_has_and_this_library_has_not_is_refused_by_name(model, settings, match, tmp_path):
    theirs = _in_peft(model, **settings)
    with torch.no_grad():
        theirs.get_output_embeddings().weight.add_(1e-3)
    theirs.save_pretrained(tmp_path / "theirs")
    _refused(model, tmp_path / "theirs", match)


def test_other_adapters_are_called_what_they_are(model, tmp_path):
    peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    _refused(model, tmp_path, r"holds a LORA adapter, .*PeftModel\.from_pretrained")


def test_dropout_and_unknown_settings_are_said(model, folder):
    _edit(folder, tinylora_dropout=0.1, exclude_modules=None)
    with pytest.warns(
        UserWarning, match=r"sets tinylora_dropout, which .*\(tinylora_dropout does so in training alone"
    ):
        tl.import_peft(model, folder).detach()
    _edit(folder, tinylora_dropout=0.0, scaling="sqrt", other=None)
    with pytest.warns(UserWarning, match="sets scaling, which this version of tinylora_lite does not have"):
        tl.import_peft(model, folder)


def test_p_is_rounded_to_the_dtype_that_it_was_trained_in(model, folder):
    for trained, loaded in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        base = copy.deepcopy(model).to(trained)
        theirs = _in_peft(base, save_projection=False)
        theirs.save_pretrained(folder)
        adapter = tl.import_peft(copy.deepcopy(base).to(loaded), folder)
        for name in adapter.names:
            P = theirs.get_submodule(f"base_model.model.{name}").tinylora_P["default"]
            assert torch.equal(adapter.factors(name).projection, P.float())


def test_another_base_is_refused(make_model, folder):
    _refused(make_model(seed=1), folder, "made for another base, .* no singular vectors")
    _refused(make_model(hidden_size=64), folder, "made for another base, .* of model.layers.0.self_attn.q_proj")
    _refused(make_model(num_hidden_layers=1), folder, "holds factors of model.layers.1.*, which is no module of this")


DAMAGES = {
    "A": (
        lambda t: t.pop("base_model.model.model.layers.1.mlp.up_proj.tinylora_A"),
        "tinylora_A of .*up_proj is missing",
    ),
    "B": (
        lambda t: t.pop("base_model.model.model.layers.0.mlp.up_proj.tinylora_B"),
        "tinylora_B of .*up_proj is missing",
    ),
    "P": (
        lambda t: t.pop("base_model.model.model.layers.0.mlp.up_proj.tinylora_P"),
        "tinylora_P of .*up_proj is missing",
    ),
    "v": (lambda t: t.pop("base_model.tinylora_v.4"), "ask for 10 vectors of length 3; it holds 0:"),
    "one v too many": (lambda t: t.update({"base_model.tinylora_v.10": torch.zeros(3)}), "ask for 10 vectors"),
    "length of v": (lambda t: t.update({"base_model.tinylora_v.0": torch.zeros(4)}), r"it holds 0: \[4\], 1: \[3\]"),
    "shape of v": (lambda t: t.update({"base_model.tinylora_v.0": torch.zeros(1, 3)}), r"it holds 0: \[1, 3\]"),
    "NaN": (lambda t: t["base_model.tinylora_v.3"].fill_(torch.nan), r"tinylora_v\.3 holds NaN"),
    "foreign": (
        lambda t: t.update({"base_model.model.lm_head.bias": torch.zeros(2)}),
        "lm_head.bias, which no adapter here can hold",
    ),
    "trained head": (
        lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(163, 32)}),
        "holds a lm_head.weight of its own",
    ),
    "everything": (lambda t: t.clear(), "ask for 0 vectors of length 3; it holds none"),
    "swapped": (
        lambda t: t.update(
            {
                f"base_model.model.model.layers.{i}.mlp.up_proj.tinylora_{part}": t[
                    f"base_model.model.model.layers.{1 - i}.mlp.up_proj.tinylora_{part}"
                ].clone()
                for i, part in [(0, "A")]
            }
        ),
        "no singular vectors of model.layers.0.mlp.up_proj",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_tensors_are_refused(model, folder, damage):
    change, match = DAMAGES[damage]
    _edit(folder, change)
    _refused(model, folder, match)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"r": 3}, r"the given factor left is .*\(32, 2\), not"),
        ({"r": 17}, "rank=17 is above the smaller side of .*k_proj"),
        ({"r": 0}, "damaged: r is 0"),
        ({"u": "3"}, "damaged: u is '3'"),
        ({"u": 4}, "10 vectors of length 4"),
        ({"weight_tying": 0.5}, "ask for 7 vectors"),
        ({"weight_tying": 1.5}, "damaged: weight_tying is 1.5"),
        ({"weight_tying": None}, "damaged: weight_tying is None"),
        ({"projection_seed": "x"}, "damaged: projection_seed is 'x'"),
        ({"peft_type": "NEW"}, "holds a NEW adapter"),
        ({"peft_type": None}, "damaged: peft_type is None"),
    ],
    ids=str,
)
def test_unfitting_settings_are_refused(model, folder, settings, match):
    _edit(folder, **settings)
    _refused(model, folder, match)


def test_damaged_files_are_refused(model, folder, tmp_path):
    tensors, config = (folder / TENSORS).read_bytes(), (folder / CONFIG).read_bytes()
    for damaged in (tensors[:-1], tensors[: len(tensors) // 2], tensors[:7], b"", b"\xff" * 64, tensors + b"x"):
        (folder / TENSORS).write_bytes(damaged)
        _refused(model, folder, "adapter_model.safetensors is damaged")
    (folder / TENSORS).write_bytes(tensors)
    for damaged in (config[:-2], b"", b"\xff\xfe{", b"[" * 100_000):
        (folder / CONFIG).write_bytes(damaged)
        _refused(model, folder, "adapter_config.json is damaged: Invalid JSON")
    for other in (b"[]", b"null", b'"TINYLORA"'):
        (folder / CONFIG).write_bytes(other)
        _refused(model, folder, "adapter_config.json is damaged: Input should be an object")
    (folder / CONFIG).write_bytes(b"{}")
    _refused(model, folder, "damaged: it names no peft_type")
    (folder / CONFIG).write_bytes(config)
    (folder / TENSORS).rename(folder / "adapter_model.bin")
    _refused(model, folder, "only a pickle; save it again")
    (folder / "adapter_model.bin").unlink()
    _refused(model, folder, "holds no adapter_model.safetensors; get the folder again")
    _refused(model, tmp_path, "its subfolders theirs do")
    shutil.rmtree(folder)
    _refused(model, tmp_path, "holds no adapter_config.json; PEFT's save_pretrained writes one")
    with pytest.raises(FileNotFoundError, match="download it first"):
        tl.import_peft(model, "someone/an-adapter")


def test_copies_of_the_base_that_peft_adds_are_compared_with_it(model, tmp_path):
    theirs = _in_peft(model)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    tl.import_peft(model, tmp_path / "theirs").detach()
    with torch.no_grad():
        theirs.get_input_embeddings().weight[5, 0] += 1e-3
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    _refused(model, tmp_path / "theirs", "holds a model.embed_tokens.weight of its own")


def test_a_wrapped_model_is_refused(model, folder):
    with pytest.raises(tl.AdapterFileError, match=r"wrapped by PEFT; give the base itself"):
        tl.import_peft(_in_peft(model), folder)


def test_a_second_adapter_is_refused_and_the_first_stays(model, folder):
    tl.import_peft(model, folder)
    with pytest.raises(tl.AdapterFileError, match="carries an adapter already"):
        tl.import_peft(model, folder)
    assert adapter_of(model) is not None


def test_export_writes_all_or_nothing_and_nothing_over_other_things(model, tmp_path, monkeypatch):
    adapter = tl.attach(model)
    other = tmp_path / "thesis"
    other.mkdir()
    tl.export_peft(adapter, other)  # an empty folder is as good as none
    first = {path.name: path.read_bytes() for path in other.iterdir()}
    assert sorted(first) == [CONFIG, TENSORS]
    (other / "README.md").write_text("mine")
    _randomise(adapter.vectors)
    tl.export_peft(adapter, other)
    assert (other / "README.md").read_text() == "mine"
    assert (other / TENSORS).read_bytes() != first[TENSORS]
    tl.export_peft(adapter, tmp_path / "deep" / "er")
    assert {path.name: path.read_bytes() for path in (tmp_path / "deep/er").iterdir()} == {
        name: (other / name).read_bytes() for name in first
    }

    (tmp_path / "file").write_text("mine")
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "to_grandma.txt").write_text("mine")
    for taken in ("file", "letters"):
        with pytest.raises(FileExistsError, match=f"{taken} exists and is no TINYLORA folder that may be replaced"):
            tl.export_peft(adapter, tmp_path / taken)
    with torch.no_grad():
        adapter.vectors[3] = torch.inf
    with pytest.raises(ValueError, match="NaN or infinity"):
        tl.export_peft(adapter, tmp_path / "new")
    with torch.no_grad():
        adapter.vectors.zero_()
    monkeypatch.setattr(json, "dumps", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tl.export_peft(adapter, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "file", "letters", "thesis"]
