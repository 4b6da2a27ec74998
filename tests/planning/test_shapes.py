"""Models by name: the shapes that are written down are those of the real models."""

import pytest
from transformers import GPT2Config, Qwen2Config

from tinylora_lite.planning.counting import count_parameters
from tinylora_lite.planning.shapes import NAMES, SHAPES, ModelShape, model_config

RANK_ONE_LORA = {
    "qwen2.5-0.5b": 549_888,
    "qwen2.5-1.5b": 1_154_048,
    "qwen2.5-3b": 1_870_848,
    "qwen2.5-7b": 2_523_136,
    "qwen2.5-math-7b": 2_523_136,
    "qwen3-8b": 2_727_936,
    "llama-3.2-3b": 1_519_616,
    "llama-3.1-8b": 2_621_440,
}
ALL_WEIGHTS = {
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
    "llama-3.1-8b": 8_030_261_248,
}


@pytest.mark.parametrize("name", RANK_ONE_LORA)
def test_rank_one_lora(name):
    assert count_parameters(model_config(name), "lora", rank=1) == RANK_ONE_LORA[name]


@pytest.mark.parametrize("name", ALL_WEIGHTS)
def test_all_weights(name):
    """What the hub's model cards say."""
    assert count_parameters(model_config(name), "full") == ALL_WEIGHTS[name]


def test_every_name_is_tested():
    assert set(NAMES) == {"nano", *SHAPES} == {"nano", *RANK_ONE_LORA}


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-7B-Instruct", "QWEN2.5-7B", "qwen2.5-7b-instruct"])
def test_names_as_the_hub_has_them(name):
    assert model_config(name).hidden_size == 3584


@pytest.mark.parametrize("as_folder", [True, False])
def test_a_config_file(tmp_path, as_folder):
    Qwen2Config(hidden_size=40, num_hidden_layers=3).save_pretrained(tmp_path)
    config = model_config(str(tmp_path if as_folder else tmp_path / "config.json"))
    assert (config.model_type, config.hidden_size, config.num_hidden_layers) == ("qwen2", 40, 3)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model_type": "no-such-model"}', '{"hidden_size": 3}'])
def test_files_that_are_no_configuration(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"no configuration of .*; give a config\.json"):
        model_config(str(tmp_path))


def test_a_folder_without_a_config(tmp_path):
    with pytest.raises(ValueError, match=r"no configuration of .*config\.json"):
        model_config(str(tmp_path))


def test_unknown_names_are_told_the_known_ones():
    with pytest.raises(ValueError, match=r"no configuration of gpt-9 .*qwen2\.5-7b"):
        model_config("gpt-9")


def test_a_model_without_such_blocks_has_no_shape():
    with pytest.raises(ValueError, match="no plan for a GPT2LMHeadModel"):
        ModelShape.of(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9))
