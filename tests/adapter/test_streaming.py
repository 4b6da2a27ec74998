"""Decompositions from shards are those of the loaded model, and fill the cache that attach reads."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

import tinylora_lite as tl
from benchmarks.shards import decompose_checkpoint
from tinylora_lite.adapter import weights
from tinylora_lite.adapter.svd import decompose
from tinylora_lite.utils import files


@pytest.fixture(params=[None, "20KB"], ids=["one file", "shards"])
def folder(model, tmp_path, request):
    sizes = {} if request.param is None else {"max_shard_size": request.param}
    model.to(torch.bfloat16).save_pretrained(tmp_path / "checkpoint", **sizes)
    assert (len(list((tmp_path / "checkpoint").glob("*.safetensors"))) > 1) is (request.param is not None)
    return tmp_path / "checkpoint"


def same(first, second):
    return all(torch.equal(getattr(first, part), getattr(second, part)) for part in ("U", "S", "Vh", "beyond"))


def test_a_checkpoint_is_decomposed_as_the_model_is(model, folder):
    found = dict(decompose_checkpoint(folder, rank=3))
    adapter = tl.attach(model, tl.TinyLoraConfig(rank=3))
    assert tuple(found) == adapter.names
    for name in adapter.names:
        assert same(found[name], decompose(model.get_parameter(f"{name}.weight"), 3))


def test_attach_finds_what_was_streamed_into_the_cache(model, folder, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    targets = ["q_proj", "down_proj"]
    names = [name for name, _ in decompose_checkpoint(folder, 2, target_modules=targets, cache=cache)]
    assert len(list(cache.iterdir())) == len(names) == 4
    expected = tl.attach(model, tl.TinyLoraConfig(target_modules=targets))
    expected.detach()

    def never(*_):
        raise AssertionError("decomposed again")

    monkeypatch.setattr(weights, "decompose", never)
    # In a wider dtype the values are the same, and so is their fingerprint.
    adapter = tl.attach(model.float(), tl.TinyLoraConfig(target_modules=targets), cache=cache)
    for name in adapter.names:
        assert torch.equal(adapter.factors(name).left, expected.factors(name).left)
        assert adapter.factors(name).portable is expected.factors(name).portable
    adapter.detach()
    with pytest.raises(AssertionError, match="decomposed again"):
        tl.attach(model, tl.TinyLoraConfig(rank=1, target_modules=targets), cache=cache)


@pytest.mark.parametrize("damage", [b"", b"no safetensors", None], ids=["empty", "foreign", "of another rank"])
def test_a_damaged_entry_is_computed_again(tmp_path, damage):
    weight = torch.randn(9, 7, generator=torch.Generator().manual_seed(0))
    found = weights.cached_decompose(weight, 2, cache=tmp_path)
    (entry,) = tmp_path.iterdir()
    content = entry.read_bytes()
    if damage is None:
        tensors = load_file(entry)
        save_file(tensors | {"S": tensors["S"][:1].clone()}, entry)
    else:
        entry.write_bytes(damage)
    assert same(weights.cached_decompose(weight, 2, cache=tmp_path), found)
    assert entry.read_bytes() == content
    assert list(tmp_path.iterdir()) == [entry]


def test_another_weight_is_no_hit(tmp_path):
    weight = torch.randn(9, 7, generator=torch.Generator().manual_seed(0))
    weights.cached_decompose(weight, 2, cache=tmp_path)
    changed = weight.clone()
    changed[8, 6] = torch.nextafter(changed[8, 6], torch.tensor(9.0))
    for other in (changed, weight.T.contiguous(), weight[:8]):
        assert same(weights.cached_decompose(other, 2, cache=tmp_path), decompose(other, 2))
    assert len(list(tmp_path.iterdir())) == 4


class TestTheUsersCache:
    @pytest.fixture
    def cache(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TINYLORA_CACHE", str(tmp_path))
        monkeypatch.setattr(weights, "CACHED_FROM", 60)
        return tmp_path / "svd"

    def test_it_is_used_unless_it_is_off(self, cache, monkeypatch):
        weight = torch.randn(9, 7, generator=torch.Generator().manual_seed(0))
        found = weights.cached_decompose(weight, 2)
        assert len(list(cache.iterdir())) == 1
        monkeypatch.setattr(weights, "decompose", lambda *_: pytest.fail("decomposed again"))
        assert same(weights.cached_decompose(weight, 2), found)
        monkeypatch.setenv("TINYLORA_CACHE", "off")
        with pytest.raises(pytest.fail.Exception, match="decomposed again"):
            weights.cached_decompose(weight, 2)

    def test_small_weights_are_not_kept(self, cache):
        weights.cached_decompose(torch.eye(7), 2)
        assert not cache.exists()

    def test_what_was_not_used_for_longest_goes_first(self, cache, monkeypatch):
        matrices = [torch.randn(9, 7, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
        for age, weight in zip((300, 200), matrices, strict=False):
            weights.cached_decompose(weight, 2)
            newest = max(cache.iterdir(), key=lambda entry: entry.stat().st_mtime)
            os.utime(newest, (newest.stat().st_mtime - age,) * 2)
        weights.cached_decompose(matrices[0], 2)  # used again, so that the second is now the older one
        size = newest.stat().st_size
        monkeypatch.setattr(files, "CACHE_LIMIT", 2 * size)
        weights.cached_decompose(matrices[2], 2)
        assert len(list(cache.iterdir())) == 2
        assert newest not in cache.iterdir()

    def test_where_it_cannot_be_written_nothing_stops(self, cache, monkeypatch):
        monkeypatch.setattr(files, "atomic_write", lambda *_: (_ for _ in ()).throw(OSError("no space left on device")))
        weight = torch.randn(9, 7, generator=torch.Generator().manual_seed(0))
        assert same(weights.cached_decompose(weight, 2), decompose(weight, 2))
        with pytest.raises(OSError, match="no space"):
            weights.cached_decompose(weight, 2, cache=cache)

    def test_one_that_may_only_be_read_is_used(self, cache, monkeypatch):
        weight = torch.randn(9, 7, generator=torch.Generator().manual_seed(0))
        found = weights.cached_decompose(weight, 2)
        monkeypatch.setattr("os.utime", lambda *_: (_ for _ in ()).throw(PermissionError("not yours")))
        monkeypatch.setattr(weights, "decompose", lambda *_: pytest.fail("decomposed again"))
        assert same(weights.cached_decompose(weight, 2), found)

    def test_there_is_none_without_a_home(self, cache, monkeypatch):
        monkeypatch.delenv("TINYLORA_CACHE")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr("os.path.expanduser", lambda path: path)
        weight = torch.randn(9, 7, generator=torch.Generator().manual_seed(0))
        assert same(weights.cached_decompose(weight, 2), decompose(weight, 2))


def test_a_folder_without_a_checkpoint(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json"):
        list(decompose_checkpoint(tmp_path))


def test_what_is_wrong_with_a_checkpoint_is_said(folder):
    def fails(kind, message):
        with pytest.raises(kind, match=message):
            list(decompose_checkpoint(folder))

    config = json.loads((folder / "config.json").read_text())
    deeper = {key: value for key, value in config.items() if key != "layer_types"} | {"num_hidden_layers": 3}
    weights = sorted(folder.glob("*.safetensors"))
    (folder / "config.json").write_text(json.dumps(deeper))
    fails(ValueError, r"holds no model\.layers\.2\.self_attn\.q_proj\.weight as safetensors, which its config\.json")
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {}}))
    fails(ValueError, "is quantized")
    (folder / "config.json").write_text("{")
    fails(OSError, "is not a valid JSON file")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj: rank must be an integer from 1 to 32"):
        list(decompose_checkpoint(folder, rank=33))
    for path in weights:
        path.write_bytes(path.read_bytes()[:-100])
    fails(ValueError, r"\.safetensors cannot be read .*; download it again")
    for path in weights:
        path.unlink()
    fails(ValueError, rf"{weights[0].name} cannot be read \(.*No such file")


def test_files_that_the_checkpoint_does_not_name_are_not_read(model, folder):
    expected = dict(decompose_checkpoint(folder, target_modules=["q_proj"]))
    strays = {name: torch.zeros_like(weight) for name, weight in model.state_dict().items()}
    for name in ("adapter_model", "aaa", "zzz"):
        save_file(strays, folder / f"{name}.safetensors")
    found = dict(decompose_checkpoint(folder, target_modules=["q_proj"]))
    assert all(same(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {"a": 3}}'])
def test_a_damaged_index(folder, content):
    (folder / "model.safetensors.index.json").write_text(content)
    (folder / "model.safetensors").unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json cannot be read"):
        list(decompose_checkpoint(folder))
