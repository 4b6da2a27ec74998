import doctest

import pytest

from tinylora_lite import GRPOSettings
from tinylora_lite.training import settings as grpo_settings


def test_worked_example():
    assert doctest.testmod(grpo_settings) == (0, 2)


def test_variants_are_the_papers():
    grpo, dr_grpo, dapo = map(GRPOSettings.variant, ("grpo", "dr_grpo", "dapo"))
    assert (grpo.scale, grpo.normalise, grpo.clip_high) == ("group", "sequence", 0.2)
    assert (dr_grpo.scale, dr_grpo.normalise) == ("none", "constant")
    assert (dapo.normalise, dapo.clip_low, dapo.clip_high, dapo.truncated) == ("token", 0.2, 0.28, "mask")
    assert GRPOSettings.variant("dapo", clip_high=0.5, seed=3) == GRPOSettings(clip_high=0.5, truncated="mask", seed=3)
    with pytest.raises(ValueError, match="grpo, dr_grpo, dapo"):
        GRPOSettings.variant("ppo")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *(
            (name, 0)
            for name in ("steps", "prompts_per_step", "max_new_tokens", "epochs_per_step", "micro_batch", "save_every")
        ),
        ("steps", 1.5),
        ("warmup", -1),
        ("evaluate_every", -1),
        ("evaluate_problems", 0),
        ("temperature", 0.0),
        ("learning_rate", -1e-3),
        ("learning_rate", float("nan")),
        ("max_grad_norm", 0.0),
        ("tis_cap", 0.0),
        ("seed", -1),
        ("seed", None),
        ("steps", True),
        ("group_size", "8"),
        *((name, value) for name in ("temperature", "learning_rate", "max_grad_norm", "kl") for value in (None, True)),
        *((name, value) for name in ("tis_cap", "clip_high") for value in ("2", float("inf"))),
        ("kl", -0.1),
        ("clip_low", 1.5),
        ("clip_high", -0.1),
        ("scale", "std"),
        ("normalise", "mean"),
        ("truncated", "drop"),
    ],
)
def test_out_of_range(setting, value):
    with pytest.raises(ValueError, match=setting) as error:
        GRPOSettings(**{setting: value})
    assert repr(value) in str(error.value)


def test_a_group_of_one_has_no_better_half():
    with pytest.raises(ValueError, match="no better half"):
        GRPOSettings(group_size=1)
