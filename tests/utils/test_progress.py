import io
import sys

import pytest

from tinylora_lite.utils.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(monkeypatch, stream, **options) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar("GRPO", total=3, done=1, **options) as advance:
        advance("reward 0.25")
        advance("reward 0.50")
    return stream.getvalue()


def test_a_terminal_sees_how_far_it_is_and_the_last_note(monkeypatch):
    text = shown(monkeypatch, Terminal())
    assert "GRPO" in text
    assert "3/3" in text
    assert "reward 0.50" in text


@pytest.mark.parametrize(("stream", "options"), [(io.StringIO, {}), (Terminal, {"show": False})])
def test_silence_in_a_log_and_when_asked(monkeypatch, capfd, stream, options):
    assert shown(monkeypatch, stream(), **options) == ""
    assert capfd.readouterr().out == ""
