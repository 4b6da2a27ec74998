"""Pretraining: it learns, an interrupted run ends in the same weights, and what it leaves is a plain checkpoint."""

import hashlib
import json
import shutil
from dataclasses import asdict, replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from tinylora_lite.nano import BASE, CHECKPOINTS, pretrain
from tinylora_lite.nano.pretrain import PretrainSettings
from tinylora_lite.nano.tokenizer import ASSISTANT, USER, build_tokenizer

TINY = PretrainSettings(
    width=16, layers=1, heads=2, kv_heads=1, mlp=16, steps=40, batch=8, warmup=5, learning_rate=0.02
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in every test: sums depend on it in their last digit
    yield folder, pretrain.pretrain(TINY, folder)
    torch.set_num_threads(threads)


def test_the_loss_falls(base, monkeypatch, tmp_path):
    monkeypatch.setattr(pretrain, "LOG_EVERY", 10)
    pretrain.pretrain(TINY, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "pretrain.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [10, 20, 30, 40]
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5


def test_an_interrupted_run_ends_in_the_same_weights(base, monkeypatch, tmp_path):
    _folder, model = base
    rates = pretrain.learning_rate

    def fail_at_27(settings, step):
        if step == 27:
            raise KeyboardInterrupt
        return rates(settings, step)

    monkeypatch.setattr(pretrain, "LOG_EVERY", 10)
    monkeypatch.setattr(pretrain, "learning_rate", fail_at_27)
    with pytest.raises(KeyboardInterrupt):
        pretrain.pretrain(TINY, tmp_path)
    monkeypatch.setattr(pretrain, "learning_rate", rates)
    resumed = pretrain.pretrain(TINY, tmp_path)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name
    rows = [json.loads(line) for line in (tmp_path / "pretrain.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [10, 20, 30, 40]
    assert not (tmp_path / "resume.pt").exists()


def test_what_is_left_is_a_plain_checkpoint_that_is_not_trained_twice(base):
    folder, model = base
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(10)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    again = pretrain.pretrain(TINY, folder)
    assert torch.equal(again(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match="holds a base with seed = 0, not 1"):
        pretrain.pretrain(replace(TINY, seed=1), folder)


def test_only_answers_are_learned_and_batches_depend_on_the_seed_alone():
    tokenizer = build_tokenizer()
    assistant = tokenizer.convert_tokens_to_ids(ASSISTANT)
    first = list(pretrain.pool_of_batches(TINY, tokenizer, 3))
    again = list(pretrain.pool_of_batches(TINY, tokenizer, 3))
    assert len(first) == pretrain.POOL
    for (ids, labels), (same, _) in zip(first, again, strict=True):
        assert torch.equal(ids, same)
        for row, wanted in zip(ids, labels, strict=True):
            start = row.tolist().index(assistant) + 1
            end = int((row != tokenizer.pad_token_id).sum())
            assert (wanted[:start] == -100).all()
            assert (wanted[end:] == -100).all()
            assert torch.equal(wanted[start:end], row[start:end])
            assert wanted[end - 1] == tokenizer.eos_token_id


def test_the_text_of_the_default_recipe_is_what_it_was():
    """The digest was made when the first base was shipped: its recipe must go on giving that base."""
    tokenizer, digest = build_tokenizer(), hashlib.sha256()
    for ids, labels in pretrain.pool_of_batches(PretrainSettings(), tokenizer, 0):
        digest.update(json.dumps([ids.tolist(), labels.tolist()]).encode())
    assert digest.hexdigest() == "fcc4a4220f5cae00b3726e1c76fbed21c44ccc4e65fa23247ff118784f5c1b28"


def test_the_mixture_changes_the_answers_and_not_the_problems():
    tokenizer = build_tokenizer()
    user, assistant = (tokenizer.convert_tokens_to_ids(mark) for mark in (USER, ASSISTANT))

    def documents(settings):
        rows = [row.tolist() for ids, _ in pretrain.pool_of_batches(settings, tokenizer, 0) for row in ids]
        asked = {tuple(row[row.index(user) : row.index(assistant)]) for row in rows}
        return asked, sum("ok" in tokenizer.decode(row[row.index(assistant) :]) for row in rows) / len(rows)

    settings = replace(TINY, batch=32)
    (asked, chatty), (same, fewer) = documents(settings), documents(replace(settings, mixture="other"))
    assert asked == same
    assert abs(chatty - 0.30) < 0.05
    assert abs(fewer - 0.20) < 0.05


def test_the_architecture_is_the_only_difference_between_the_families():
    tokenizer = build_tokenizer()
    qwen2 = pretrain.build_model(TINY, tokenizer)
    llama = pretrain.build_model(replace(TINY, architecture="llama"), tokenizer)
    assert (qwen2.config.model_type, llama.config.model_type) == ("qwen2", "llama")
    assert llama.lm_head.weight is llama.model.embed_tokens.weight
    shapes = {name: weight.shape for name, weight in qwen2.named_parameters() if not name.endswith("bias")}
    assert {name: weight.shape for name, weight in llama.named_parameters()} == shapes


def test_a_llama_of_the_other_mixture_is_trained_from_the_command_line(monkeypatch, tmp_path):
    tiny = [f"--{name.replace('_', '-')}={value}" for name, value in asdict(replace(TINY, steps=2, batch=2)).items()]
    names = ["--architecture", "llama", "--mixture", "other", "--folder", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["pretrain", *tiny, *names])
    pretrain.main()
    recipe = json.loads((tmp_path / "recipe.json").read_text())
    assert (recipe["architecture"], recipe["mixture"]) == ("llama", "other")
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.model_type == "llama"


@pytest.mark.parametrize("name", ["architecture", "mixture", "precision"])
def test_a_name_that_is_none_is_refused(name, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["pretrain", f"--{name}", "gpt"])
    with pytest.raises(SystemExit):
        pretrain.main()
    assert "invalid choice: 'gpt'" in capsys.readouterr().err


def test_a_recipe_from_before_a_setting_existed_has_its_default(base, tmp_path):
    """The shipped base's recipe names neither an architecture nor a mixture."""
    folder, model = base
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    recipe = json.loads((tmp_path / "recipe.json").read_text())
    older = {name: value for name, value in recipe.items() if name not in ("architecture", "mixture")}
    (tmp_path / "recipe.json").write_text(json.dumps(older))
    ids = torch.arange(10)[None]
    assert torch.equal(pretrain.pretrain(TINY, tmp_path)(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match="holds a base with mixture = 'default', not 'other'"):
        pretrain.pretrain(replace(TINY, mixture="other"), tmp_path)
    (tmp_path / "recipe.json").write_text(json.dumps(recipe | {"dropout": 0.1}))
    with pytest.raises(ValueError, match=r"a base with dropout = 0\.1, and this one has none"):
        pretrain.pretrain(TINY, tmp_path)


def test_the_shipped_base_is_the_default_recipe():
    recipe = json.loads((CHECKPOINTS / BASE / "recipe.json").read_text())
    assert PretrainSettings(**recipe) == PretrainSettings()
    rows = [json.loads(line) for line in (CHECKPOINTS / BASE / "pretrain.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == recipe["steps"]
    assert rows[-1]["seconds"] < 3600


def test_in_bf16_products_are_rounded_and_weights_are_not(base, tmp_path):
    model = pretrain.pretrain(replace(TINY, precision="bf16"), tmp_path)
    losses = [
        json.loads((folder / "pretrain.jsonl").read_text().splitlines()[-1])["loss"] for folder in (base[0], tmp_path)
    ]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], abs=0.05)
    moved = [p for p in model.parameters() if not torch.equal(p, p.bfloat16().float())]
    assert moved, "weights that were trained in bf16 would all be numbers of bf16"


ONE_THING = {
    "qwen2-0.4m-unnamed": {"named": 0.0},
    "qwen2-0.4m-often": {"named": 0.9},
    "qwen2-0.4m-undecayed": {"weight_decay": 0.0},
    "qwen2-0.4m-short": {"steps": 2500},
    "qwen2-0.4m-seed1": {"seed": 1},
    "qwen2-1m": {"width": 128, "mlp": 320},
    "qwen2-5m": {"width": 256, "mlp": 704, "heads": 8, "kv_heads": 4, "precision": "bf16"},
    "llama-0.4m": {"architecture": "llama", "mixture": "other"},
    "llama-0.4m-default": {"architecture": "llama"},
}


def test_shipped_bases_differ_from_the_smallest_in_what_they_are_for():
    smallest = PretrainSettings(width=72, mlp=208)
    recipes = {path.parent.name: json.loads(path.read_text()) for path in CHECKPOINTS.glob("*/recipe.json")}
    expected = {name: replace(smallest, **thing) for name, thing in ONE_THING.items()} | {"qwen2-0.4m": smallest}
    assert {name: PretrainSettings(**recipe) for name, recipe in recipes.items()} == expected
    sizes = [path.stat().st_size for path in CHECKPOINTS.rglob("*") if path.is_file()]
    assert sum(sizes) <= 24 * 2**20
