"""A file appears whole or not at all."""

import pytest
import torch

from tinylora_lite.utils.files import atomic_write


def test_text_and_bytes(tmp_path):
    assert atomic_write(tmp_path / "new" / "a.txt", "é\n").read_bytes() == "é\n".encode()
    assert atomic_write(tmp_path / "a.bin", b"\x00\xff").read_bytes() == b"\x00\xff"
    assert atomic_write(tmp_path / "a.bin", b"second").read_bytes() == b"second"
    assert atomic_write(tmp_path / "a.bin", lambda file: torch.save([1], file)).stat().st_size > 0
    assert torch.load(tmp_path / "a.bin") == [1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "new"]


def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path, monkeypatch):
    path = atomic_write(tmp_path / "a.txt", "old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("no space left on device")))
    with pytest.raises(OSError, match="no space"):
        atomic_write(path, "new")
    assert (path.read_text(), list(tmp_path.iterdir())) == ("old", [path])


def test_others_may_read_it(tmp_path):
    """As a file that open() makes, whatever the umask."""
    (tmp_path / "plain").write_text("")
    assert atomic_write(tmp_path / "a", "").stat().st_mode == (tmp_path / "plain").stat().st_mode
