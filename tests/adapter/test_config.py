"""Settings: the defaults are the paper's, and what cannot work is refused with its cure."""

import pytest
import torch

from tinylora_lite import Basis, TinyLoraConfig, lora_xs


def test_a_set_of_names_has_one_order():
    assert TinyLoraConfig(target_modules={"v_proj", "q_proj", "k_proj"}).target_modules == (
        "k_proj",
        "q_proj",
        "v_proj",
    )


def test_the_defaults_are_the_papers():
    config = TinyLoraConfig()
    assert (config.rank, config.u, config.tying, config.sigma, config.projection) == (2, 1, "tiled", "left", "random")
    assert config.target_modules is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank must be an integer of at least 1, not 0"),
        ({"rank": 2.0}, "rank must be an integer of at least 1, not 2.0"),
        ({"rank": True}, "rank must be an integer of at least 1, not True"),
        ({"u": -3}, "u must be an integer of at least 1, not -3"),
        ({"n_tie": 0}, 'n_tie must be an integer of at least 1 or "all", not 0'),
        ({"n_tie": "every"}, "n_tie must be an integer of at least 1 or \"all\", not 'every'"),
        ({"n_tie": None}, 'n_tie must be an integer of at least 1 or "all", not None'),
        ({"tying": "random"}, "tying must be one of tiled, structured, not 'random'"),
        ({"sigma": "both"}, "sigma must be one of left, split, right, not 'both'"),
        ({"seed": -1}, "seed must be an integer from 0 to 2**64 - 1, not -1"),
        ({"seed": 2**64}, f"seed must be an integer from 0 to 2**64 - 1, not {2**64}"),
        ({"seed": None}, "seed must be an integer from 0 to 2**64 - 1, not None"),
        ({"target_modules": "q_proj"}, "target_modules must be a list of at least one name, or None, not 'q_proj'"),
        ({"target_modules": []}, "target_modules must be a list of at least one name, or None, not []"),
        ({"target_modules": 5}, "target_modules must be a list of at least one name, or None, not 5"),
        ({"target_modules": [""]}, "target_modules must be a list of at least one name, or None, not ['']"),
        ({"target_modules": [3]}, "target_modules must be a list of at least one name, or None, not [3]"),
        ({"projection": "gaussian"}, "projection must be random, shared, identity or a basis, not 'gaussian'"),
        ({"projection": None}, "projection must be random, shared, identity or a basis, not None"),
        ({"scale": 0}, "scale must be a number above 0, not 0"),
        ({"scale": float("inf")}, "scale must be a number above 0, not inf"),
        ({"scale": True}, "scale must be a number above 0, not True"),
        ({"init_std": -1e-5}, "init_std must be a number of at least 0, not -1e-05"),
        ({"init_std": "small"}, "init_std must be a number of at least 0, not 'small'"),
        ({"projection": "identity", "u": 3}, "projection='identity' needs u = rank² = 4, not u=3"),
    ],
)
def test_a_setting_outside_its_range(settings, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        TinyLoraConfig(**settings)
    assert str(error.value) == message


def test_settings_outside_a_basis():
    basis = Basis(torch.zeros(3, 2, 4, 4), ("a", "b"), sigma="split")
    TinyLoraConfig(rank=4, u=3, sigma="split", projection=basis)
    for settings, message in [
        ({"rank": 2, "u": 3, "sigma": "split"}, "calibrated with rank=4; the config says 2"),
        ({"rank": 4, "u": 3}, "calibrated with sigma='split'; the config says 'left'"),
        ({"rank": 4, "u": 4, "sigma": "split"}, "holds 3 directions, fewer than u=4"),
    ]:
        with pytest.raises(ValueError, match=message):
            TinyLoraConfig(projection=basis, **settings)


def test_targets_cannot_change_behind_the_config():
    targets = ["q_proj"]
    config = TinyLoraConfig(target_modules=targets)
    targets.append("k_proj")
    assert config.target_modules == ("q_proj",)
    assert config == TinyLoraConfig(target_modules=("q_proj",))
    assert hash(config) == hash(TinyLoraConfig(target_modules=["q_proj"]))


def test_lora_xs_trains_every_entry_of_every_module():
    assert lora_xs(3) == TinyLoraConfig(rank=3, u=9, n_tie=1, sigma="right", projection="identity")
    assert lora_xs(2, sigma="left", target_modules=["q_proj"]).target_modules == ("q_proj",)


@pytest.mark.parametrize("rank", [0, "4", None, 1.5])
def test_lora_xs_of_no_rank(rank):
    with pytest.raises(ValueError, match="rank must be an integer of at least 1"):
        lora_xs(rank)
