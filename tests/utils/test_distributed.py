"""Progress is shown by the first process, on a terminal or in a notebook, unless it is switched off."""

import pytest

from tinylora_lite.utils import distributed


@pytest.mark.parametrize(("variable", "hidden"), [(None, None), ("0", None), ("1", True)])
def test_the_variable_of_tqdm_hides_it(monkeypatch, variable, hidden):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    if variable is not None:
        monkeypatch.setenv("TQDM_DISABLE", variable)
    assert distributed.hide_progress() is hidden
    assert distributed.hide_progress(False) is True


def test_the_first_process_alone_shows_it(monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    assert distributed.hide_progress() is True
