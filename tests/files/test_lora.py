"""An exported LoRA is the adapter: to PEFT, which knows nothing of this library, and by the numbers in the file."""

import copy
import gc
import json
import os
import re
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tinylora_lite import Basis, TinyLoraConfig, attach, export_lora, export_peft, lora_xs
from tinylora_lite.adapter.tying import MODULE_TYPES

TOKENS = torch.arange(2, 26).reshape(2, 12)
QUERY = "model.layers.{}.self_attn.q_proj"


def directions(rank=4, count=13):
    names = [f"model.layers.{layer}.{part}" for layer in range(2) for part in PARTS]
    values = torch.randn(count, len(names), rank, rank, generator=torch.Generator().manual_seed(1))
    return Basis(values / values.flatten(1).norm(dim=1)[:, None, None, None], tuple(names))


PARTS = [f"self_attn.{t}" for t in MODULE_TYPES[:4]] + [f"mlp.{t}" for t in MODULE_TYPES[4:]]
CONFIGS = {
    "random, tiled": TinyLoraConfig(rank=2, u=3, n_tie=4),
    "calibrated, one vector for all": TinyLoraConfig(rank=4, u=13, n_tie="all", projection=directions()),
    "structured, Σ split": TinyLoraConfig(rank=3, u=2, n_tie=2, tying="structured", sigma="split"),
    "LoRA-XS": lora_xs(rank=3),
    "some types": TinyLoraConfig(u=2, target_modules=["v_proj", "down_proj"], tying="structured", n_tie=2),
    "one module of a type": TinyLoraConfig(u=2, target_modules=[QUERY.format(1), "up_proj"]),
}


# An adapter does not keep its model alive, so every test holds on to the model that it adapts.
def adapted(model, config=None, scale=0.3):
    adapter = attach(model, config or CONFIGS["random, tiled"])
    with torch.no_grad():
        adapter.vectors.copy_(scale * torch.randn(adapter.vectors.shape, generator=torch.Generator().manual_seed(7)))
    return adapter


def served(base, folder, **settings):
    """A model with the LoRA as PEFT loads it; a warning, as of keys that are missing or left over, is an error."""
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)  # of names between PEFT and transformers
        return peft.PeftModel.from_pretrained(base, folder, **settings).eval()


def settings_of(folder):
    return json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_peft_computes_the_same(make_model, tmp_path, config):
    model = make_model()
    base, unadapted = copy.deepcopy(model), model(TOKENS).logits
    adapter = adapted(model, config)
    assert export_lora(adapter, tmp_path / "lora") == tmp_path / "lora"
    theirs = served(base, tmp_path / "lora")
    layers = [name.removeprefix("base_model.model.") for name, m in theirs.named_modules() if hasattr(m, "lora_A")]
    assert sorted(layers) == sorted(adapter.names)
    with torch.no_grad():
        ours, wanted = model(TOKENS).logits, theirs(TOKENS).logits
    assert (ours - unadapted).norm() > 0.03 * ours.norm()
    assert (ours - wanted).norm() < 1e-6 * ours.norm()


def test_peft_of_a_bfloat16_base(make_model, tmp_path):
    model = make_model("llama").bfloat16()
    base = copy.deepcopy(model)
    adapter = adapted(model, TinyLoraConfig(rank=2, u=3, n_tie=4, arithmetic="float32"))
    export_lora(adapter, tmp_path / "lora")
    theirs = served(base, tmp_path / "lora")
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    for name in adapter.names[:4]:
        ours, wanted = (m.get_submodule(name)(x) for m in (model, theirs.base_model.model))
        # Both round one float32 sum to bfloat16, and only R's place in the product differs.
        assert (ours != wanted).float().mean() < 0.01
        assert (ours - wanted).float().norm() < 1e-3 * ours.float().norm()
        assert (ours != model.get_submodule(name).forward(x)).float().mean() > 0.5


def test_transformers_loads_it_as_its_own_adapter(make_model, tmp_path):
    pytest.importorskip("peft")
    model = make_model()
    base = copy.deepcopy(model)
    export_lora(adapted(model), tmp_path / "lora")
    base.load_adapter(str(tmp_path / "lora"))
    with torch.no_grad():
        assert (model(TOKENS).logits - base.eval()(TOKENS).logits).norm() < 1e-6 * model(TOKENS).logits.norm()


def test_a_new_adapter_is_the_base_bit_for_bit(make_model, tmp_path):
    model = make_model()
    base = copy.deepcopy(model)
    export_lora(attach(model), tmp_path / "lora")
    assert torch.equal(served(base, tmp_path / "lora")(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize(("dtype", "error"), [("fp32", 2e-7), ("fp16", 1e-3), ("bf16", 8e-3)])
def test_the_file_holds_the_update_as_two_thin_matrices(model, tmp_path, dtype, error):
    adapter = adapted(model)
    export_lora(adapter, tmp_path / "lora", dtype=dtype)
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {getattr(torch, NAMES[dtype])}
    for name in adapter.names:
        A, B = (tensors.pop(f"base_model.model.{name}.lora_{letter}.weight") for letter in "AB")
        assert (A.shape[0], B.shape[1]) == (2, 2)
        factors = adapter.factors(name)
        R = torch.einsum("u,ujk->jk", adapter.vectors[adapter.groups[adapter.names.index(name)]], factors.projection)
        wanted = factors.left.double() @ R.double() @ factors.right.double()
        assert (B.double() @ A.double() - wanted).norm() < error * wanted.norm()
    assert tensors == {}


NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def test_target_modules_name_no_module_too_many(make_model, tmp_path):
    for number, (targets, wanted) in enumerate(
        [
            (None, list(MODULE_TYPES)),
            (["k_proj"], ["k_proj"]),
            ([QUERY.format(0)], [QUERY.format(0)]),
            ([QUERY.format(1), "down_proj"], [QUERY.format(1), *(f"model.layers.{i}.mlp.down_proj" for i in (0, 1))]),
        ]
    ):
        model = make_model()
        export_lora(attach(model, TinyLoraConfig(target_modules=targets)), tmp_path / str(number))
        assert sorted(settings_of(tmp_path / str(number))["target_modules"]) == sorted(wanted)


def test_a_model_that_is_no_language_model(tmp_path):
    model = nn.ModuleDict({name: nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)) for name in ("encoder", "decoder")})
    export_lora(adapted(model, TinyLoraConfig(target_modules=["encoder.1"])), tmp_path / "lora")
    settings = settings_of(tmp_path / "lora")
    assert (settings["target_modules"], settings["task_type"]) == (["encoder.1"], None)
    assert settings["base_model_name_or_path"] is None


def test_settings_scale_by_one_and_name_the_base(make_model, tmp_path):
    model = make_model()
    model.config.name_or_path = model.name_or_path = "someone/their-model"
    export_lora(attach(model, lora_xs(rank=3)), tmp_path / "hub")
    settings = settings_of(tmp_path / "hub")
    assert (settings["r"], settings["lora_alpha"], settings["use_rslora"]) == (3, 3, False)
    assert settings["base_model_name_or_path"] == "someone/their-model"
    assert settings["task_type"] == "CAUSAL_LM"

    make_model().save_pretrained(tmp_path / "my-base")
    local = type(model).from_pretrained(tmp_path / "my-base")
    export_lora(attach(local), tmp_path / "local")
    assert settings_of(tmp_path / "local")["base_model_name_or_path"] == "my-base"


def test_every_version_of_peft_knows_the_settings(model, tmp_path):
    peft = pytest.importorskip("peft")
    export_lora(attach(model), tmp_path / "lora")
    assert settings_of(tmp_path / "lora").keys() <= peft.LoraConfig().to_dict().keys()


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_equal_adapters_give_equal_bytes(make_model, tmp_path):
    for name, model in (("a", make_model()), ("b", make_model())):
        export_lora(adapted(model), tmp_path / name)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_an_export_is_replaced_whole(make_model, tmp_path, monkeypatch):
    folder = tmp_path / "deep" / "lora"
    one, other = make_model(), make_model()
    export_lora(adapted(one), folder)
    before = contents(folder)
    adapter = adapted(other, lora_xs(rank=3))
    export_lora(adapter, folder)
    after = contents(folder)
    assert settings_of(folder)["r"] == 3
    assert list(folder.parent.iterdir()) == [folder]

    replace = os.replace

    def full(source, target):
        if Path(target).name == "adapter_config.json":
            raise OSError("no space left on device")
        return replace(source, target)

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space left"):
        export_lora(adapter, folder)
    assert contents(folder) == after != before
    assert list(folder.parent.iterdir()) == [folder]


def test_a_write_that_fails_leaves_nothing(model, tmp_path, monkeypatch):
    def full(*arguments, **settings):
        raise OSError("no space left on device")

    adapter = attach(model)
    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space left"):
        export_lora(adapter, tmp_path / "lora")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_filled(model, tmp_path):
    (tmp_path / "lora").mkdir()
    export_lora(attach(model), tmp_path / "lora")
    assert len(contents(tmp_path / "lora")) == 2


def test_what_is_no_export_stays(model, tmp_path):
    adapter = adapted(model, TinyLoraConfig(u=2))
    (tmp_path / "file").write_text("notes")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("notes")
    export_peft(adapter, tmp_path / "peft")
    export_lora(adapter, tmp_path / "with notes")
    (tmp_path / "with notes" / "a.txt").write_text("notes")
    for name in ("damaged", "list"):
        export_lora(adapter, tmp_path / name)
        (tmp_path / name / "adapter_config.json").write_text({"damaged": "{", "list": "[]"}[name])
    for folder in tmp_path.iterdir():
        before = contents(folder) if folder.is_dir() else folder.read_bytes()
        with pytest.raises(FileExistsError, match=rf"^{re.escape(str(folder))} exists and is no LORA folder that may"):
            export_lora(adapter, folder)
        assert before == (contents(folder) if folder.is_dir() else folder.read_bytes())


def test_a_lora_that_peft_trained_stays(model, make_model, tmp_path):
    peft = pytest.importorskip("peft")
    peft.get_peft_model(make_model(), peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "README.md").unlink()
    before = contents(tmp_path / "theirs")
    with pytest.raises(FileExistsError):
        export_lora(attach(model), tmp_path / "theirs")
    assert contents(tmp_path / "theirs") == before


def test_numbers_that_do_not_fit_are_refused(model, tmp_path):
    adapter = adapted(model, scale=1e6)
    with pytest.raises(ValueError, match=r"^model\.layers\.0\.self_attn\.q_proj: .* too large for fp16; use fp32"):
        export_lora(adapter, tmp_path / "lora", dtype="fp16")
    export_lora(adapter, tmp_path / "lora")
    with torch.no_grad():
        adapter.vectors[0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity; train the adapter again"):
        export_lora(adapter, tmp_path / "other")
    with pytest.raises(ValueError, match="dtype must be one of fp32, fp16, bf16, not 'float32'"):
        export_lora(adapter, tmp_path / "other", dtype="float32")
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]


def test_detached_is_fine_and_without_a_model_is_not(make_model, tmp_path):
    model = make_model()
    adapter = adapted(model)
    export_lora(adapter, tmp_path / "attached")
    adapter.detach()
    export_lora(adapter, tmp_path / "detached")
    assert contents(tmp_path / "attached") == contents(tmp_path / "detached")
    del model
    gc.collect()
    with pytest.raises(ValueError, match="model no longer exists"):
        export_lora(adapter, tmp_path / "gone")
