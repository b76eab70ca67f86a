"""The cache of compiled CUDA kernels: right after any damage, and never in the way."""

from __future__ import annotations

import pytest

from fastadam.kernels import cubins


def must_not_be_made():
    raise AssertionError("compiled again")


def test_made_once(tmp_path):
    assert cubins.cached(tmp_path, "a", lambda: b"one") == b"one"
    assert cubins.cached(tmp_path, "a", must_not_be_made) == b"one"
    assert cubins.cached(tmp_path, "b", lambda: b"two") == b"two"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("keep", [0, 10, 32, 33])
def test_a_file_cut_short_is_made_again(tmp_path, keep):
    cubins.cached(tmp_path, "a", lambda: b"content")
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:keep])
    assert cubins.cached(tmp_path, "a", lambda: b"content") == b"content"
    assert cubins.cached(tmp_path, "a", must_not_be_made) == b"content"


def test_no_place(tmp_path):
    assert cubins.cached(None, "a", lambda: b"one") == b"one"
    (tmp_path / "file").write_text("")
    assert cubins.cached(tmp_path / "file" / "below", "a", lambda: b"one") == b"one"


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError

    monkeypatch.setattr("os.replace", fail)
    assert cubins.cached(tmp_path, "a", lambda: b"one") == b"one"
    assert list(tmp_path.iterdir()) == []


def test_folder():
    assert cubins.folder(cubins.cached).is_dir() or cubins.folder(cubins.cached).parent.is_dir()
