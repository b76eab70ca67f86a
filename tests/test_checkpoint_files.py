"""Checkpoints as files: whole or not there, and nothing that is not exactly what was saved."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from fastadam import FusedAdam, Segment, atomic, checkpoint, containers


def small(step=1):
    opt = FusedAdam(0.5, amsgrad=True, state_dtype=("float32", "bfloat16"), segments=[Segment(0, 2, lr=0.25)])
    arrays = {name: np.full(3, step, np.float32) for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")}
    values = {"step": step, **arrays, "state_dtype": "float32"}
    opt.load_state_dict({**opt.state_dict(), **values})
    return opt


@pytest.fixture
def path(tmp_path):
    small().save(tmp_path / "run", params=np.ones(3), extra={"epoch": 1})
    return tmp_path / "run"


def test_safetensors_reads_it(path):
    loaded = safetensors.torch.load_file(path)
    assert loaded["max_exp_avg_sq"].dtype == torch.bfloat16
    assert loaded["exp_avg"].tolist() == loaded["params"].tolist() == [1, 1, 1]
    assert loaded["segments"][0, :3].tolist() == [0, 2, 0.25]
    with safetensors.safe_open(path, framework="pt") as file:
        assert file.metadata()["format"] == "fastadam checkpoint"
        assert file.get_slice("exp_avg")[1:].tolist() == [1, 1]
    size = int.from_bytes(path.read_bytes()[:8], "little")
    assert size % 8 == 0  # and so the numbers are aligned


def reads(path):
    """All that is in a file, by every way that reads it."""
    with checkpoint.Checkpoint(path) as file:
        file.params()
    return FusedAdam.load(path)


def test_any_byte_that_changed_is_found(rng, path):
    data = path.read_bytes()
    reads(path)
    for k in range(len(data)):
        flip = rng.choice([1, 0x20, 0x80, 0xFF])  # 0x20 is small and capital letters
        path.write_bytes(data[:k] + bytes([data[k] ^ flip]) + data[k + 1 :])
        with pytest.raises(ValueError, match=r"^path must "):
            reads(path)


def test_any_part_of_a_file_is_found(path):
    data = path.read_bytes()
    for whole in (*range(0, len(data), 7), len(data) - 1):
        path.write_bytes(data[:whole])
        with pytest.raises(ValueError, match=r"^path must (be a whole safetensors file|have)"):
            reads(path)
    path.write_bytes(data + b" ")
    with pytest.raises(ValueError, match=f"^path must have {len(data)} bytes, as its header says; got .*of "):
        reads(path)


def test_what_was_damaged_is_named(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    opt, params = small(2), np.zeros(3)
    before = opt.state_dict()
    where = re.escape(f"path must have the bytes that were saved; got '{path}', with others in ")
    with pytest.raises(
        ValueError, match=rf"^{where}'\w+', bytes \d+ to {len(data)} of the file\. It is damaged"
    ):
        reads(path)
    with pytest.raises(ValueError, match=f"^{where}"):
        opt.load_state_dict(checkpoint.read(path))
    with pytest.raises(ValueError, match=f"^{where}"):
        FusedAdam.load(path, params=params)
    assert all(
        np.array_equal(value, before[name], equal_nan=name == "segments")
        for name, value in opt.state_dict().items()
    )
    assert params.tolist() == [0, 0, 0]


def test_foreign_files(tmp_path):
    path = tmp_path / "run"
    got = f"got '{path}', "
    safetensors.numpy.save_file({"weight": np.ones(3)}, path)
    with pytest.raises(
        ValueError, match=re.escape(f"path must be a fastadam checkpoint; {got}a safetensors file")
    ):
        reads(path)
    safetensors.numpy.save_file({"weight": np.ones(3)}, path, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=re.escape(f"path must be a fastadam checkpoint; {got}a safetensors file")
    ):
        reads(path)
    for data in (
        b"",
        b"PK\x03\x04" * 99,
        b"\x02" + bytes(7) + b"[]",
        b"\x02" + bytes(7) + b"{}",
        b"\xff" * 99,
    ):
        path.write_bytes(data)
        with pytest.raises(
            ValueError, match=r"^path must be a (whole safetensors file|fastadam checkpoint); got"
        ):
            reads(path)
    with pytest.raises(FileNotFoundError):
        reads(tmp_path / "none")


def write(path, **changes):
    """Write a checkpoint of no step, with other texts: its checksums are right."""
    document = {
        "step": 0,
        "hyperparameters": {},
        "schedules": {"segments": []},
        "grads_summed": 0,
        "loss_scale": None,
    } | changes.pop("document", {})
    texts = {"format": checkpoint.KIND, "version": "1", "optimizer": json.dumps(document), "extra": "null"}
    with path.open("wb") as file:
        containers.write(file, {}, {**texts, **changes}, lambda _: None)


def test_newer_files(tmp_path):
    write(tmp_path / "run")
    assert FusedAdam.load(tmp_path / "run").state.step == 0
    write(tmp_path / "run", version="2")
    message = (
        f"path must be a fastadam checkpoint of version 1 at most; got '{tmp_path / 'run'}', of version 2."
        " Update fastadam."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        FusedAdam.load(tmp_path / "run")


@pytest.mark.parametrize(
    "document",
    [
        {"step": -1},
        {"step": "1"},
        {"step": 1, "grads_summed": 1},
        {"size": -1},
        {"size": "1"},
        {"hyperparameters": {"lr": -1.0}},
        {"hyperparameters": {"unknown": 1}},
        {"hyperparameters": []},
        {"schedules": {"lr": {"schedule": "__import__", "arguments": {"name": "os"}}, "segments": []}},
        {"schedules": {"lr": {"schedule": "constant", "arguments": {"lr": -1}}, "segments": []}},
        {"schedules": {"segments": [3]}},
        {"loss_scale": {"scale": 1.0}},
    ],
    ids=str,
)
def test_what_nobody_could_have_written(tmp_path, document):
    write(tmp_path / "run", document=document)
    with pytest.raises(
        ValueError, match=r"^path must be a fastadam checkpoint; got .*, with what nobody could"
    ):
        FusedAdam.load(tmp_path / "run")


# --- Writing ------------------------------------------------------------------------------------------------

KILLS = Path(__file__).with_name("checkpoint_kills.py")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_a_kill_at_any_moment_leaves_a_whole_file(tmp_path):
    done = subprocess.run([sys.executable, KILLS, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rounds, stale, kinds = json.loads(done.stdout)
    assert rounds == 30
    assert stale > 0  # some were killed while they wrote
    assert kinds > 1
    assert names_in(tmp_path) == ["run"]  # the last save has removed what they left


def names_in(folder):
    return sorted(entry.name for entry in folder.iterdir())


def leftovers(folder):
    return [name for name in names_in(folder) if name.startswith(".")]


def test_a_full_disk_leaves_the_old_file(path):
    resource = pytest.importorskip("resource")
    before, opt = path.read_bytes(), FusedAdam()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            opt.save(path, params=np.ones(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert leftovers(path.parent) == []


def test_places_where_no_file_can_be(path, tmp_path):
    with pytest.raises(FileNotFoundError):
        FusedAdam().save(tmp_path / "none" / "run")
    message = f"path must be a file; got '{tmp_path}', a directory."
    with pytest.raises(IsADirectoryError, match=f"^{re.escape(message)}$"):
        FusedAdam().save(tmp_path)
    assert names_in(tmp_path) == ["run"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a named pipe")
def test_a_device_or_a_pipe_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    message = f"path must be a file; got '{tmp_path / 'pipe'}', a device or a pipe."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        FusedAdam().save(tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()


def test_an_interrupt_leaves_the_old_file(path):
    before = path.read_bytes()

    def interrupt(done, total):
        assert leftovers(path.parent) != []
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        small(2).save(path, progress=interrupt)
    assert path.read_bytes() == before
    assert leftovers(path.parent) == []


def test_only_what_nobody_writes_is_removed(path):
    stale, other = path.parent / ".fastadam-0123456789abcdef.tmp", path.parent / ".other.tmp"
    stale.touch()
    other.touch()
    with atomic.replacing(path.parent / "second") as file:
        file.write(b"whole")
        (living,) = set(leftovers(path.parent)) - {other.name}
        assert living != stale.name
        small(2).save(path)
        assert living in leftovers(path.parent)
    assert names_in(path.parent) == [".other.tmp", "run", "second"]
    assert (path.parent / "second").read_bytes() == b"whole"


@pytest.mark.skipif(os.name == "nt", reason="links and modes are POSIX's")
def test_links_and_modes_stay(path, tmp_path):
    path.chmod(0o640)
    link = tmp_path / "latest"
    link.symlink_to(path)
    small(2).save(link)
    assert link.is_symlink()
    assert FusedAdam.load(path).state.step == 2
    assert path.stat().st_mode & 0o777 == 0o640


def test_the_disk_has_the_file_before_its_name(path, monkeypatch):
    events, sync, rename = [], os.fsync, Path.replace

    def fsync(descriptor):
        events.append(
            "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else os.fstat(descriptor).st_size
        )
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", lambda *paths: (events.append("renamed"), rename(*paths)))
    small(2).save(path)
    assert events == [path.stat().st_size, "renamed", *["folder"] * hasattr(os, "O_DIRECTORY")]
