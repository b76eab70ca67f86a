"""Compiled CUDA kernels: a cache right after any damage, and never in the way; the names in them."""

from __future__ import annotations

import os
import struct

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


def test_the_stamp_of_a_file(tmp_path):
    library, link = tmp_path / "library.so.1", tmp_path / "library.so"
    library.write_bytes(b"one")
    link.symlink_to(library)
    os.utime(library, (1, 1))
    before = cubins.stamp(str(link))
    assert cubins.stamp(str(link)) == before
    os.utime(library, (1, 1.5))
    assert cubins.stamp(str(link)) == before
    os.utime(library, (1, 2))
    later = cubins.stamp(str(link))
    library.write_bytes(b"longer")
    os.utime(library, (1, 1))
    assert len({before, later, cubins.stamp(str(link)), cubins.stamp(str(library))}) == 4


# --- Names --------------------------------------------------------------------------------------------------

NONE, FUNCTION, GLOBAL_FUNCTION = 0x03, 0x02, 0x12


def elf(*symbols):
    """An ELF file of a header, the sections of symbols and their names, and what describes the sections."""
    strings, table = b"\0", b""
    for name, info, other in symbols:
        table += struct.pack("<IBBHQQ", len(strings), info, other, 1, 0, 0)
        strings += name + b"\0"
    content = table + strings
    header = bytearray(64)
    header[:6] = b"\x7fELF\2\1"
    struct.pack_into("<Q", header, 0x28, 64 + len(content))
    struct.pack_into("<HHH", header, 0x3A, 64, 3, 0)
    sections = [
        (0, 0, 0, 0),
        (2, 64, len(table), 2),
        (3, 64 + len(table), len(strings), 0),
    ]
    described = b"".join(
        struct.pack("<IIQQQQIIQQ", 0, kind, 0, 0, offset, length, link, 0, 0, 0)
        for kind, offset, length, link in sections
    )
    return bytes(header) + content + described


SUBROUTINES = [(b".text.kernel", NONE, 0), (b"$slow_division", FUNCTION, 0), (b"helper", GLOBAL_FUNCTION, 0)]
KERNEL = (b"kernel", GLOBAL_FUNCTION, 0x10)


def test_the_name_of_the_only_kernel():
    assert cubins.symbol(elf(*SUBROUTINES, KERNEL)) == b"kernel"
    assert cubins.symbol(elf((b"kernel", GLOBAL_FUNCTION, 0x90), *SUBROUTINES)) == b"kernel"


@pytest.mark.parametrize(
    ("kernels", "names"), [([], []), ([KERNEL, (b"other", GLOBAL_FUNCTION, 0x10)], [b"kernel", b"other"])]
)
def test_not_one_kernel(kernels, names):
    with pytest.raises(RuntimeError) as caught:
        cubins.symbol(elf(*SUBROUTINES, *kernels))
    assert str(caught.value) == f"cubin must have one entry point; got {names}."


@pytest.mark.parametrize("keep", [0, 63, 70, 120, -1])
def test_a_name_from_a_file_cut_short(keep):
    cubin = elf(*SUBROUTINES, KERNEL)[:keep]
    with pytest.raises(RuntimeError, match=r"^cubin must "):
        cubins.symbol(cubin)
