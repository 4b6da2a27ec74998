import doctest

from tinylora_lite.utils import record
from tinylora_lite.utils.record import seed_of


def test_worked_example():
    assert doctest.testmod(record) == (0, 1)


def test_the_same_on_every_machine():
    assert seed_of("rollout", 0, 1) == 3212554230238907754


def test_no_two_purposes_share_a_stream():
    parts = [
        (what, seed, step) for what in ("rollout", "evaluate", "prompts") for seed in range(20) for step in range(200)
    ]
    found = {seed_of(*each) for each in parts}
    assert len(found) == len(parts)
    # The Mersenne twister of PyTorch's CPU generator is seeded with the lower 32 bits alone.
    assert len({seed & 0xFFFFFFFF for seed in found}) >= len(parts) - 2
    assert all(0 <= seed < 2**63 for seed in found)


def test_a_number_is_not_its_text():
    assert seed_of("a", 1) != seed_of("a", "1")
    assert seed_of("a", 11) != seed_of("a", 1, 1)
