"""How many numbers train: the paper's counts, from configurations alone."""

import doctest

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from tinylora_lite import TinyLoraConfig, attach, count_parameters, lora_xs, plan
from tinylora_lite.planning import counting
from tinylora_lite.planning.shapes import without_weights


def qwen2(layers, hidden, heads, kv_heads, mlp, vocabulary, tied):
    return Qwen2Config(
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=mlp,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
    )


def llama(layers, hidden, heads, kv_heads, mlp, tied):
    return LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=mlp,
        vocab_size=128256,
        tie_word_embeddings=tied,
    )


QWEN3_8B = Qwen3Config(
    num_hidden_layers=36,
    hidden_size=4096,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    intermediate_size=12288,
    vocab_size=151936,
    tie_word_embeddings=False,
)
QWEN_05B = qwen2(24, 896, 14, 2, 4864, 151936, True)
QWEN_15B = qwen2(28, 1536, 12, 2, 8960, 151936, True)
QWEN_3B = qwen2(36, 2048, 16, 2, 11008, 151936, True)
QWEN_7B = qwen2(28, 3584, 28, 4, 18944, 152064, False)
LLAMA_3B = llama(28, 3072, 24, 8, 8192, True)
LLAMA_8B = llama(32, 4096, 32, 8, 14336, False)

# modules, rank-1 LoRA, every parameter (the last as on the models' cards)
MODELS = {
    "Qwen2.5-0.5B": (QWEN_05B, 168, 549_888, 494_032_768),
    "Qwen2.5-1.5B": (QWEN_15B, 196, 1_154_048, 1_543_714_304),
    "Qwen2.5-3B": (QWEN_3B, 252, 1_870_848, 3_085_938_688),
    "Qwen2.5-7B": (QWEN_7B, 196, 2_523_136, 7_615_616_512),
    "Llama-3.2-3B": (LLAMA_3B, 196, 1_519_616, 3_212_749_824),
    "Llama-3-8B": (LLAMA_8B, 224, 2_621_440, 8_030_261_248),
    "Qwen3-8B": (QWEN3_8B, 252, 2_727_936, 8_190_735_360),
}


def test_worked_example():
    assert doctest.testmod(counting).failed == 0


@pytest.mark.parametrize("name", MODELS)
def test_the_models_of_the_paper(name):
    config, modules, lora, full = MODELS[name]
    assert count_parameters(config, "lora", rank=1) == lora
    assert count_parameters(config, "lora", rank=64) == 64 * lora
    assert count_parameters(config, "lora_xs", rank=1) == modules
    assert count_parameters(config, "lora_xs", rank=16) == modules * 256
    assert count_parameters(config, "tinylora") == modules
    assert count_parameters(config, "full") == full


@pytest.mark.parametrize(
    ("config", "biases", "printed"), [(QWEN_3B, 36 * 2560, 3_085_846_528), (QWEN_7B, 28 * 4608, 7_615_487_488)]
)
def test_table_2_prints_the_full_count_without_the_biases_of_q_k_v(config, biases, printed):
    assert count_parameters(config, "full") - biases == printed


TILED_7B = {1: 196, 2: 98, 4: 49, 8: 25, 16: 13, 32: 7, 64: 4, 128: 2, 196: 1, 256: 1, 512: 1, "all": 1}
TILED_3B = {1: 252, 2: 126, 4: 63, 8: 32, 16: 16, 32: 8}
STRUCTURED_3B = {1: 252, 2: 126, 4: 63, 8: 35, 16: 21, 32: 14, 36: 7, 100: 7, "all": 1}


@pytest.mark.parametrize(
    ("config", "tying", "series"),
    [(QWEN_7B, "tiled", TILED_7B), (QWEN_3B, "tiled", TILED_3B), (QWEN_3B, "structured", STRUCTURED_3B)],
)
def test_the_series_of_the_paper(config, tying, series):
    # Counted on one model, because building it is what takes time.
    with torch.device("meta"):
        model = without_weights(config)
    for n_tie, groups in series.items():
        assert count_parameters(model, "tinylora", n_tie=n_tie, tying=tying) == groups
        assert count_parameters(model, "tinylora", u=13, n_tie=n_tie, tying=tying) == 13 * groups


def test_the_rows_of_table_2():
    rows = {(2, 1): 392, (32, 1): 6_272, (512, 1): 100_352, (1, 16): 13, (1, 4): 49}
    assert {key: count_parameters(QWEN_7B, u=key[0], n_tie=key[1]) for key in rows} == rows
    rows = {(2, 1): 504, (32, 1): 8_064, (512, 1): 129_024, (1, 16): 16, (1, 4): 63}
    assert {key: count_parameters(QWEN_3B, u=key[0], n_tie=key[1]) for key in rows} == rows


def test_vera_has_two_vectors_in_every_module():
    block = 2 * 16 + 2 * 8 + 2 * 24 + 16  # outputs of q and o, k and v, gate and up, down
    config = Qwen2Config(
        num_hidden_layers=3, hidden_size=16, num_attention_heads=4, num_key_value_heads=2, intermediate_size=24
    )
    assert count_parameters(config, "vera", rank=5) == 3 * (block + 7 * 5)


def test_targets_narrow_every_method_but_full(make_model):
    model = make_model()
    targets = ["q_proj", "layers.1.mlp.up_proj"]
    assert count_parameters(model, "lora", rank=2, target_modules=targets) == 2 * (2 * 64 + 80)
    assert count_parameters(model, "tinylora", u=3, target_modules=targets) == 9
    assert count_parameters(model, "full", target_modules=targets) == count_parameters(model, "full")


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_counts_like_its_configuration_and_shared_embeddings_once(make_model, tied):
    model = make_model(tie_word_embeddings=tied)
    numbers = {id(p): p.numel() for p in model.parameters()}
    assert count_parameters(model, "full") == count_parameters(model.config, "full") == sum(numbers.values())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert count_parameters(model, "lora", rank=3) == count_parameters(model.config, "lora", rank=3)


@pytest.mark.parametrize("n_tie", [1, 2, 3, 5, 14, "all"])
@pytest.mark.parametrize("tying", ["tiled", "structured"])
def test_what_is_counted_is_what_trains(model, n_tie, tying):
    adapter = attach(model, TinyLoraConfig(u=3, n_tie=n_tie, tying=tying))
    trainable = sum(p.numel() for p in [*model.parameters(), *adapter.parameters()] if p.requires_grad)
    assert count_parameters(model.config, u=3, n_tie=n_tie, tying=tying) == adapter.num_parameters == trainable


def test_lora_xs_counts_what_it_trains(model):
    assert attach(model, lora_xs(3)).num_parameters == count_parameters(model, "lora_xs", rank=3) == 14 * 9


@pytest.mark.parametrize(("budget", "n_tie", "spent"), [(13, 16, 13), (14, 14, 14), (12, 17, 12), (1, 196, 1)])
def test_plan_spends_at_most_the_budget(budget, n_tie, spent):
    config = plan(QWEN_7B, budget)
    assert config == TinyLoraConfig(n_tie=n_tie)
    assert count_parameters(QWEN_7B, n_tie=config.n_tie) == spent


def test_plan_defaults_to_thirteen_and_stops_at_no_tying():
    assert plan(QWEN_7B) == TinyLoraConfig(rank=2, u=1, n_tie=16)
    assert plan(QWEN_7B, 10_000).n_tie == 1


def test_plan_takes_the_smallest_n_tie_that_fits(model):
    for settings in ({}, {"u": 2}, {"tying": "structured"}, {"target_modules": ("q_proj", "up_proj")}):
        for budget in range(7, 30):
            config = plan(model, budget, **settings)
            assert count_parameters(model, n_tie=config.n_tie, **settings) <= budget
            if config.n_tie > 1:
                assert count_parameters(model, n_tie=config.n_tie - 1, **settings) > budget


def test_plan_passes_settings_on(model):
    config = plan(model, 13, rank=4, seed=3, sigma="split", target_modules=["q_proj"])
    assert config == TinyLoraConfig(rank=4, seed=3, sigma="split", target_modules=["q_proj"])


@pytest.mark.parametrize(
    ("budget", "settings", "message"),
    [
        (0, {}, "tiled tying with u=1 takes at least 1 parameters, budget=0; raise it$"),
        (6, {"tying": "structured"}, 'takes at least 7 parameters, budget=6; raise it or set tying="tiled"$'),
        (3, {"u": 4}, "with u=4 takes at least 4 parameters, budget=3"),
        (13, {"rank": 0}, "rank must be "),
    ],
)
def test_plans_that_cannot_be(model, budget, settings, message):
    with pytest.raises(ValueError, match=message):
        plan(model, budget, **settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "dora"}, "method must be one of full, lora, lora_xs, vera, tinylora, not 'dora'"),
        ({"method": "lora"}, '"lora" needs rank=, an integer of at least 1, not None'),
        ({"method": "lora", "rank": True}, "an integer of at least 1, not True"),
        ({"method": "vera", "rank": 0}, '"vera" needs rank=, an integer of at least 1, not 0'),
        ({"method": "lora_xs", "rank": 17}, "the smallest side is 16"),
        ({"u": 0}, "u must be "),
        ({"n_tie": 0}, "n_tie must be "),
        ({"tying": "odd"}, "tying must be one of"),
        ({"target_modules": ["c_attn"]}, "no linear layer named c_attn in Qwen2ForCausalLM; set target_modules to"),
    ],
)
def test_questions_without_an_answer(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        count_parameters(model, **arguments)


def test_what_is_neither_model_nor_configuration():
    with pytest.raises(ValueError, match=r"not str; AutoConfig\.from_pretrained makes one"):
        count_parameters("Qwen/Qwen2.5-7B", "full")
    with pytest.raises(ValueError, match="no linear layer named"):
        count_parameters(nn.Sequential(nn.ReLU()), "lora", rank=1)
