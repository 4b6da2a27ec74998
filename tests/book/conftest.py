"""The book's own records, by sampled and by greedy answers."""

import pytest

from tinylora_lite.lab.store import Store


@pytest.fixture(scope="session")
def store() -> Store:
    return Store()


@pytest.fixture(scope="session")
def greedy(store) -> Store:
    return store.scored("greedy")
