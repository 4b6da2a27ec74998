"""Adapter files: what is saved comes back, what does not belong is refused and leaves the model untouched."""

import json
import os
import pickle
import stat
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

import tinylora_lite as tl
from tinylora_lite.adapter import weights
from tinylora_lite.adapter.attached import adapter_of
from tinylora_lite.adapter.layer import Factors
from tinylora_lite.adapter.svd import decompose
from tinylora_lite.adapter.tying import find_target_modules
from tinylora_lite.adapter.weights import base_fingerprint
from tinylora_lite.files import adapter_file as files
from tinylora_lite.files.adapter_file import load, save
from tinylora_lite.files.file_format import KEY, AdapterFileError

RANDOM = tl.TinyLoraConfig(rank=2, u=1, n_tie=2, seed=3)
VECTORS = torch.tensor([[0.1], [-0.2], [0.3], [1e-3], [-1e-4], [0.0], [7.0]])


def build_model(seed: int = 0) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=31,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            max_position_embeddings=64,
        )
    ).eval()


@pytest.fixture
def model() -> Qwen2ForCausalLM:
    return build_model()


def make_basis(model, rank=4, directions=3, seed=0) -> tl.Basis:
    names = tuple(target.name for target in find_target_modules(model))
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(len(names) * rank**2, directions, generator=generator)
    return tl.Basis(torch.linalg.qr(flat)[0].T.reshape(directions, len(names), rank, rank).contiguous(), names)


def write(model, path, config=RANDOM, vectors=VECTORS, dtype="fp32") -> Path:
    adapter = tl.attach(model, config)
    with torch.no_grad():
        adapter.vectors.copy_(vectors)
    written = save(adapter, path, dtype)
    adapter.detach()
    return written


@pytest.fixture
def path(model, tmp_path) -> Path:
    return write(model, tmp_path / "a.tinylora")


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(8)[None]).logits


def assert_refused(model, path, reason, **options):
    """Loading fails with the reason in one line, and leaves no hook, no flag and no value changed."""
    before, values = logits(model), base_fingerprint(model)
    with pytest.raises(AdapterFileError, match=reason) as caught:
        load(model, path, **options)
    assert "\n" not in str(caught.value)
    assert adapter_of(model) is None
    assert all(not module._forward_hooks for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert base_fingerprint(model) == values
    assert torch.equal(logits(model), before)


def rewrite(path: Path, change) -> None:
    """Edits header and tensors and puts a fitting checksum on them, as only a forger would."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()[KEY])
    tensors = load_file(path)
    change(header, tensors)
    header["checksum"] = files.checksum(header, tensors)
    save_file(tensors, path, {KEY: json.dumps(header)})


@pytest.mark.parametrize(
    ("dtype", "torch_dtype"), [("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)]
)
def test_comes_back_as_stored(model, tmp_path, dtype, torch_dtype):
    config = tl.TinyLoraConfig(rank=3, u=1, n_tie=2, tying="tiled", seed=11, sigma="split")
    path = write(model, tmp_path / "new" / "folder" / "a.tinylora", config, dtype=dtype)
    assert path == tmp_path / "new" / "folder" / "a.tinylora"
    adapter = load(model, path)
    assert adapter.config == config
    assert adapter.vectors.dtype == torch.float32
    assert torch.equal(adapter.vectors, VECTORS.to(torch_dtype).float())
    assert load_file(path)["vectors"].dtype == torch_dtype


def test_the_loaded_adapter_computes_what_the_saved_one_did(model, tmp_path):
    adapter = tl.attach(model, RANDOM)
    torch.nn.init.normal_(adapter.vectors, std=0.3)
    path = save(adapter, tmp_path / "a.tinylora", "fp32")
    expected = logits(model)
    adapter.detach()
    assert not torch.equal(logits(model), expected)
    load(model, path)
    assert torch.equal(logits(model), expected)


def test_saving_leaves_the_adapter_as_it_is(model, tmp_path):
    adapter = tl.attach(model, RANDOM)
    torch.nn.init.normal_(adapter.vectors)
    before = adapter.vectors.detach().clone()
    save(adapter, tmp_path / "a.tinylora", "bf16")
    assert torch.equal(adapter.vectors, before)


def test_settings_with_names_and_with_all_tied(model, tmp_path):
    config = tl.TinyLoraConfig(rank=2, u=4, n_tie="all", target_modules=["q_proj", "up_proj"], projection="identity")
    path = write(model, tmp_path / "a", config, torch.ones(1, 4))
    loaded = load(model, path)
    assert (loaded.config, loaded.num_parameters, len(loaded.names)) == (config, 4, 4)


def test_thirteen_numbers_stay_under_four_kibibytes(tmp_path):
    """28 layers as in Qwen2.5-7B, whose 196 modules make the file that the paper's 13 numbers need."""
    config = Qwen2Config(vocab_size=8, hidden_size=8, num_hidden_layers=28, intermediate_size=8)
    config.num_attention_heads = config.num_key_value_heads = 2
    model = Qwen2ForCausalLM(config)
    path = write(model, tmp_path / "a", tl.TinyLoraConfig(rank=2, u=1, n_tie=16), torch.ones(13, 1), "bf16")
    assert path.stat().st_size <= 4096
    assert load_file(path)["vectors"].untyped_storage().nbytes() == 26


def test_equal_adapters_give_equal_bytes(model, tmp_path):
    files_ = {write(model, tmp_path / str(i)).read_bytes() for i in range(4)}
    assert len(files_) == 1


def test_the_file_can_be_read_by_whoever_the_umask_lets(path):
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_a_failed_save_leaves_the_old_file_and_nothing_else(model, path, monkeypatch):
    before = path.read_bytes()

    def full_disk(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        write(model, path, vectors=VECTORS + 1)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("value", "dtype", "reason"),
    [(float("nan"), "fp32", "NaN or infinity"), (1e6, "fp16", "too large for fp16"), (1.0, "int8", "dtype must be")],
)
def test_numbers_that_no_file_should_hold(model, tmp_path, value, dtype, reason):
    with pytest.raises(ValueError, match=reason):
        write(model, tmp_path / "a", vectors=torch.full((7, 1), value), dtype=dtype)
    assert not (tmp_path / "a").exists()


def test_a_folder_of_the_saving_machine_stays_private(tmp_path):
    build_model().save_pretrained(tmp_path / "private" / "my-base")
    model = Qwen2ForCausalLM.from_pretrained(tmp_path / "private" / "my-base")
    path = write(model, tmp_path / "a")
    assert b"my-base" in path.read_bytes()
    assert b"private" not in path.read_bytes()


# Other bases


def test_another_base(path):
    assert_refused(build_model(seed=1), path, "weights differ")


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.down_proj.weight", "model.layers.0.input_layernorm.weight", "lm_head.weight"]
)
def test_a_base_with_one_changed_entry(model, path, name):
    with torch.no_grad():
        entry = model.get_parameter(name).view(-1)[5:6]
        entry.copy_(torch.nextafter(entry, torch.tensor([9.0])))
    assert_refused(model, path, "weights differ")


def test_a_base_of_another_shape(path):
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=31, hidden_size=32, num_hidden_layers=3, intermediate_size=48))
    assert_refused(model, path, "adapted modules")


def test_a_model_without_such_modules(path):
    with pytest.raises(AdapterFileError, match="no linear layer"):
        load(torch.nn.Sequential(torch.nn.Linear(4, 4)), path)


def test_a_lossless_load_in_another_precision_is_the_same_base(tmp_path):
    path = write(build_model().bfloat16().float(), tmp_path / "a")
    assert load(build_model().bfloat16(), path).num_parameters == 7


def test_a_rounded_base_is_refused_and_told_the_dtype(model, path):
    assert_refused(model.bfloat16(), path, "load that base in float32, not in bfloat16")


def test_a_model_that_carries_an_adapter_keeps_it(model, path):
    first = tl.attach(model, RANDOM)
    with pytest.raises(AdapterFileError, match="carries an adapter"):
        load(model, path)
    assert adapter_of(model) is first


# Damaged, foreign and edited files


def test_no_file(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="no adapter file at"):
        load(model, tmp_path / "a.tinylora")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated(model, path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    assert_refused(model, path, "damaged")


def test_every_flipped_byte_is_noticed(model, path):
    """One bit in each of 60 places over the whole file, length field, header and payload."""
    content = path.read_bytes()
    for place in range(0, len(content), len(content) // 60):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(AdapterFileError):
            load(model, path)
    path.write_bytes(content)
    load(model, path)


def test_pickles_are_not_opened(model, tmp_path):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was executed",))

    (tmp_path / "a").write_bytes(pickle.dumps(Trap()))
    assert_refused(model, tmp_path / "a", "damaged or no adapter file")


def test_foreign_safetensors(model, tmp_path):
    save_file({"vectors": torch.ones(7, 1)}, tmp_path / "a", {"format": "pt"})
    assert_refused(model, tmp_path / "a", "no adapter file of this library")


def test_a_later_format(model, path):
    rewrite(path, lambda header, tensors: header.update(format="tinylora-adapter-2"))
    assert_refused(model, path, "its format is 'tinylora-adapter-2', not .*; a later tinylora_lite may know it")


def test_an_edited_setting(model, path):
    content = path.read_bytes()
    assert b'\\"seed\\": 3' in content
    path.write_bytes(content.replace(b'\\"seed\\": 3', b'\\"seed\\": 4'))
    assert_refused(model, path, "was edited")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda h, t: t.update(vectors=torch.ones(6, 1)), r"ask for \[7, 1\]"),
        (lambda h, t: t.update(vectors=torch.ones(7, 2)), r"ask for \[7, 1\]"),
        (lambda h, t: t.update(vectors=torch.ones(7)), "lacks vectors, or"),
        (lambda h, t: t.pop("vectors"), "lacks vectors, or"),
        (lambda h, t: t.pop("decomposition"), "lacks decomposition, or"),
        (lambda h, t: t.update(decomposition=torch.zeros(5, 2)), "for 5 modules, not 14"),
        (lambda h, t: t["vectors"].fill_(torch.nan), "lacks vectors, or it is not finite"),
        (lambda h, t: t["decomposition"].fill_(torch.inf), "lacks decomposition, or it is not finite"),
        (lambda h, t: t.update(vectors=torch.ones(7, 1, dtype=torch.int32)), "lacks vectors, .*of a bad type"),
        (lambda h, t: t.update({"left.99": torch.ones(32, 2)}), "does not fit"),
        (lambda h, t: h.update(settings=[]), "lacks settings"),
        (lambda h, t: h.pop("base_sha256"), "lacks base_sha256"),
        (lambda h, t: h["settings"].update(seed=-1), "does not fit"),
        (lambda h, t: h["settings"].update(rank=33), "rank=33"),
        (lambda h, t: h["settings"].update(alpha=1), "it sets alpha, unknown to this version .*; upgrade it"),
        (lambda h, t: h.pop("settings"), "settings"),
    ],
)
def test_forged_files_are_checked_all_the_same(model, path, change, reason):
    rewrite(path, change)
    assert_refused(model, path, reason)


def test_whatever_stops_a_load_leaves_the_model_bare(model, path, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "_check_tensors", stopped)
    with pytest.raises(KeyboardInterrupt):
        load(model, path)
    assert adapter_of(model) is None
    assert all(not module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("factors", ["auto", None, 1])
def test_factors_are_true_or_false(model, tmp_path, factors):
    with pytest.raises(ValueError, match=f"factors must be True or False, not {factors!r}"):
        save(tl.attach(model, RANDOM), tmp_path / "a.tinylora", factors=factors)


def test_another_seed_of_the_projections_does_not_pass_for_the_same(model, path):
    rewrite(path, lambda header, tensors: header["settings"].update(seed=4))
    assert_refused(model, path, "another decomposition")


def test_another_decomposition_of_the_same_weights(model, path, monkeypatch):
    """A machine whose SVD gives one singular vector the other sign."""

    def flipped(weight, rank, seed=0):
        found = decompose(weight, rank, seed)
        found.U[:, -1] *= -1
        return found

    monkeypatch.setattr(weights, "decompose", flipped)
    assert_refused(model, path, "another decomposition of model.layers.0.self_attn.q_proj")


def test_rounding_of_another_machine_passes(model, path, monkeypatch):
    def noisy(weight, rank, seed=0):
        f = decompose(weight, rank, seed)
        noisy = {"U": f.U + 1e-4 * torch.randn_like(f.U), "Vh": f.Vh + 1e-4 * torch.randn_like(f.Vh)}
        return replace(f, S=f.S * (1 + 1e-5), **noisy)

    monkeypatch.setattr(weights, "decompose", noisy)
    assert torch.equal(load(model, path).vectors, VECTORS)


# Where v alone would mean something else elsewhere


@pytest.fixture
def degenerate(model):
    """One weight whose second and third singular values agree: its second vector may be any of a plane."""
    weight = model.get_parameter("model.layers.1.mlp.up_proj.weight").detach()
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    S[2] = S[1]
    weight.copy_((U * S) @ Vh)
    return model


def another_plane(weight, rank, seed=0):
    """A machine that finds the second vector elsewhere in its plane, where there is one."""
    found = decompose(weight, rank, seed)
    if found.portable:
        return found
    U, _, Vh = torch.linalg.svd(weight, full_matrices=False)
    return replace(found, U=found.U.index_copy(1, torch.tensor([1]), U[:, 2:3]), Vh=torch.stack([found.Vh[0], Vh[2]]))


def test_equal_singular_values_are_told_and_their_factors_stored(degenerate, tmp_path, monkeypatch):
    config = tl.TinyLoraConfig(rank=2, u=2, n_tie=2, seed=3)
    adapter = tl.attach(degenerate, config)
    torch.nn.init.normal_(adapter.vectors)
    adapter.vectors.data = adapter.vectors.data.bfloat16().float()
    deltas = {name: adapter.delta(name) for name in adapter.names}
    with pytest.warns(UserWarning, match=r"of model\.layers\.1\.mlp\.up_proj are too close .* factors are stored too"):
        path = save(adapter, tmp_path / "a.tinylora")
    assert sorted(load_file(path)) == ["decomposition", "left.12", "projection.12", "right.12", "vectors"]
    alone = tmp_path / "alone.tinylora"
    alone.write_bytes(path.read_bytes())
    rewrite(alone, lambda header, tensors: [tensors.pop(f"{part}.12") for part in ("left", "right", "projection")])
    adapter.detach()
    monkeypatch.setattr(weights, "decompose", another_plane)
    assert_refused(degenerate, alone, "use its LoRA export")
    loaded = load(degenerate, path)
    assert all(torch.equal(loaded.delta(name), deltas[name]) for name in deltas)
    # Saved again, the factors go along: nobody could compute them from the base.
    again = save(loaded, tmp_path / "again.tinylora")
    first, second = load_file(path), load_file(again)
    assert all(torch.equal(first[part], second[part]) for part in ("vectors", "left.12", "right.12", "projection.12"))


def test_all_factors_in_the_file_take_no_decomposition(model, tmp_path, monkeypatch):
    adapter = tl.attach(model, RANDOM)
    with torch.no_grad():
        adapter.vectors.copy_(VECTORS)
    deltas = {name: adapter.delta(name) for name in adapter.names}
    path = save(adapter, tmp_path / "a.tinylora", "fp32", factors=True)
    adapter.detach()
    monkeypatch.setattr(weights, "decompose", None)
    loaded = load(model, path)
    assert loaded.given == set(loaded.names)
    assert all(torch.equal(loaded.delta(name), deltas[name]) for name in deltas)


# Calibrated adapters


@pytest.fixture
def calibrated(model, tmp_path) -> tuple[Path, tl.Basis]:
    basis = make_basis(model)
    config = tl.TinyLoraConfig(rank=4, u=3, n_tie="all", projection=basis)
    return write(model, tmp_path / "adapter" / "c.tinylora", config, torch.tensor([[1.0, 2.0, 3.0]])), basis


def test_a_basis_is_named_not_stored(model, calibrated):
    path, basis = calibrated
    assert basis.fingerprint().encode() in path.read_bytes()
    assert path.stat().st_size < 4096


@pytest.mark.parametrize("where", ["given", "file", "folder", "beside", "package"])
def test_where_a_basis_is_found(model, calibrated, tmp_path, monkeypatch, where):
    path, basis = calibrated
    given = basis
    if where in ("file", "folder"):
        file = tl.save_basis(basis, tmp_path / "elsewhere" / "some-name.safetensors")
        tl.save_basis(make_basis(model, seed=5), file.with_name("another.safetensors"))
        given = file if where == "file" else file.parent
    elif where == "beside":
        tl.save_basis(basis, path.with_name("basis.safetensors"))
        build_model().save_pretrained(path.parent)
        given = None
    elif where == "package":
        tl.save_basis(basis, tmp_path / "shipped" / "my-base.safetensors")
        monkeypatch.setattr("tinylora_lite.files.basis.SHIPPED_BASES", tmp_path / "shipped")
        given = None
    adapter = load(model, path, basis=given)
    assert adapter.config.projection.fingerprint() == basis.fingerprint()
    assert adapter.vectors.tolist() == [[1.0, 2.0, 3.0]]


def test_a_missing_basis(model, calibrated, tmp_path):
    path, basis = calibrated
    tl.save_basis(make_basis(model, seed=5), path.with_name("basis.safetensors"))
    assert_refused(model, path, f"calibrated basis {basis.fingerprint()[:12]}.*not found beside it")
    assert_refused(model, path, "no basis file at", basis=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert_refused(model, path, "not found at", basis=tmp_path / "empty")


def test_another_basis(model, calibrated):
    path, _ = calibrated
    assert_refused(model, path, "the one given is", basis=make_basis(model, seed=5))


def test_a_damaged_basis_file(model, calibrated, tmp_path):
    path, basis = calibrated
    file = tl.save_basis(basis, tmp_path / "b.safetensors")
    file.write_bytes(file.read_bytes()[:-10])
    assert_refused(model, path, "b.safetensors is damaged", basis=file)


def test_a_length_field_of_many_gigabytes(model, path):
    path.write_bytes(struct.pack("<Q", 1 << 40) + path.read_bytes()[8:])
    assert_refused(model, path, "damaged")


def test_two_modules_may_share_their_given_factors(tmp_path):
    shared = Factors(torch.ones(4, 2), torch.ones(2, 4), torch.ones(1, 2, 2))
    config = tl.TinyLoraConfig(rank=2, target_modules=["0", "1"])
    model, fresh = (torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)) for _ in range(2))
    fresh.load_state_dict(model.state_dict())
    adapter = tl.attach(model, config, factors={"0": shared, "1": shared})
    loaded = load(fresh, save(adapter, tmp_path / "a"))
    assert loaded.given == {"0", "1"}
    assert torch.equal(loaded.factors("1").left, shared.left)
