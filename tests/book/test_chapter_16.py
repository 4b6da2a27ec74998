"""What chapter 16, "The claims", says of the lab's records."""


def test_two_cores_repeat_every_run_within_a_day(store):
    assert sum(record["seconds"] for record in store.values()) / 3600 / 2 < 24
