"""PEFT's rules of tying against the counts that PEFT itself gave, and against a search."""

from collections import Counter

import pytest
import torch

from tinylora_lite.files.peft import groups_of_ratio, ratio_of_groups


@pytest.mark.parametrize(
    ("weight_tying", "sizes"),
    [
        (0.0, {1: 196}),
        (0.1, {1: 175, 21: 1}),
        (0.3, {1: 136, 60: 1}),
        (0.5, {2: 98}),
        (0.6, {2: 77, 42: 1}),
        (0.9, {9: 19, 25: 1}),
        (1.0, {196: 1}),
    ],
)
def test_groups_of_the_196_modules_of_qwen_7b(weight_tying, sizes):
    """As PEFT made them of a model of that many modules; only ratios whose groups divide 196 are even."""
    groups = groups_of_ratio(196, weight_tying)
    assert Counter(Counter(groups).values()) == sizes
    assert groups == sorted(groups)


def test_every_grouping_of_peft_has_a_ratio():
    for modules in (1, 2, 3, 7, 14, 36, 196, 252):
        for count in range(1, modules + 1):
            groups = groups_of_ratio(modules, 1 - count / modules)
            assert len(set(groups)) == count
            ratio = ratio_of_groups(groups)
            assert groups_of_ratio(modules, ratio) == groups


def test_other_groups_have_none():
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        modules = int(torch.randint(1, 24, (), generator=generator))
        steps = torch.rand(modules, generator=generator) < torch.rand((), generator=generator)
        groups = (steps.cumsum(0) % 5).tolist()

        def gives(ratio, groups=groups, modules=modules):
            pairs = set(zip(groups_of_ratio(modules, ratio), groups, strict=True))
            return len(pairs) == len(set(groups)) == len({theirs for theirs, _ in pairs})

        found = ratio_of_groups(groups)
        if any(gives(ratio / 1000) for ratio in range(1001)):
            assert gives(found)
        else:
            assert found == 0
