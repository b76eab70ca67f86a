"""Shards of a checkpoint, how far reading and writing is, and every error of an argument."""

from __future__ import annotations

import io
import re
import sys

import numpy as np
import pytest
from tolerances import assert_same_bits

from fastadam import DynamicLossScale, FusedAdam, Segment, checkpoint, containers, progress, schedules

N = 128 * 5 + 9
OPTIONS = {
    "plain": {"amsgrad": True},
    "stored": {
        "state_dtype": "8bit",
        "offset": 256,
        "seed": 9,
        "segments": [Segment(100, 300, lr=schedules.constant(0.5)), Segment(300, 310, frozen=True)],
    },
}


def saved(rng, path, name):
    opt, params = FusedAdam(0.1, **OPTIONS[name]), rng.standard_normal(N).astype(np.float16)
    for _ in range(2):
        opt.step(params, rng.standard_normal(N).astype(np.float16))
    if name == "plain":
        opt.accumulate(rng.standard_normal(N).astype(np.float16))
    opt.save(path, params=params)
    return opt, params


@pytest.mark.parametrize("name", OPTIONS)
def test_shards_have_the_bits_of_the_whole(rng, tmp_path, monkeypatch, name):
    monkeypatch.setattr(containers, "_BLOCK", 256)  # bytes: shards begin and end within blocks
    whole, params = saved(rng, tmp_path / "run", name)
    parts = []
    for start, stop in ((0, 128), (128, 384), (384, N)):
        part = np.empty(stop - start, np.float16)
        opt = FusedAdam.load(tmp_path / "run", shard=(start, stop), params=part)
        assert opt.offset == whole.offset + start
        other = FusedAdam(state_dtype=whole.state_dtype)
        other.load_state_dict(checkpoint.read_shard(tmp_path / "run", start, stop))
        found, expected = opt.state_dict(), other.state_dict()
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            np.testing.assert_array_equal(found[key], value)
        parts.append((start, stop, opt, part))
    grads = rng.standard_normal(N).astype(np.float16)
    if name == "plain":
        whole.step(params)
    whole.step(params, grads)
    for start, stop, opt, part in parts:
        if name == "plain":
            opt.step(part)
        opt.step(part, grads[start:stop])
        assert_same_bits(part.view(np.uint16), params[start:stop].view(np.uint16))
        assert_same_bits(opt.state.exp_avg, whole.state.exp_avg[start:stop])
        assert_same_bits(opt.state.exp_avg_sq, whole.state.exp_avg_sq[start:stop])


def test_segments_of_a_shard(tmp_path):
    rate = schedules.constant(0.5)
    opt = FusedAdam(segments=[Segment(40, 50, lr=0.3), Segment(0, 10, lr=0.1), Segment(10, 30, lr=rate)])
    moments = dict.fromkeys(("exp_avg", "exp_avg_sq"), np.zeros(50))
    opt.load_state_dict({**opt.state_dict(), "step": 1, **moments})
    opt.save(tmp_path / "run")
    for shard, expected in (
        ((0, 50), opt.segments),
        ((5, 20), (Segment(0, 5, lr=0.1), Segment(5, 15, lr=rate))),
        ((20, 41), (Segment(20, 21, lr=0.3), Segment(0, 10, lr=rate))),
        ((30, 40), ()),
    ):
        assert FusedAdam.load(tmp_path / "run", shard=shard).segments == expected


def test_a_shard_reads_only_its_blocks(rng, tmp_path, monkeypatch):
    monkeypatch.setattr(containers, "_BLOCK", 256)
    saved(rng, tmp_path / "run", "plain")
    data = bytearray((tmp_path / "run").read_bytes())
    data[-1] ^= 1  # of the parameters, which are last
    data[-2 * N - 1] ^= 1  # of what lies before, in float32
    (tmp_path / "run").write_bytes(data)
    checkpoint.read_shard(tmp_path / "run", 0, 640)
    with pytest.raises(ValueError, match=r"^path must have the bytes that were saved"):
        checkpoint.read_shard(tmp_path / "run", 0, 641)
    with checkpoint.Checkpoint(tmp_path / "run") as file:
        assert file.params(0, 512).size == 512
        with pytest.raises(ValueError, match=r"^path must have the bytes that were saved.*'params'"):
            file.params(513)


# --- Progress -----------------------------------------------------------------------------------------------


def test_progress_is_told_in_bytes(rng, tmp_path, monkeypatch):
    monkeypatch.setattr(containers, "_BLOCK", 256)
    opt, params = saved(rng, tmp_path / "run", "plain")
    total = N * (3 * 4 + 4)
    calls = []
    for transfer, nbytes in (
        (
            lambda: opt.save(tmp_path / "run", params=params, progress=lambda *c: calls.append(c)),
            total + 2 * N,
        ),
        (lambda: FusedAdam.load(tmp_path / "run", progress=lambda *c: calls.append(c)), total),
        (lambda: checkpoint.read(tmp_path / "run", progress=lambda *c: calls.append(c)), total),
    ):
        calls.clear()
        transfer()
        done = [call[0] for call in calls]
        assert done == sorted(done)
        assert len(done) > 10
        assert calls[-1] == (nbytes, nbytes)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_is_shown_for_large_files_in_a_terminal(rng, tmp_path, monkeypatch):
    opt, _ = saved(rng, tmp_path / "run", "plain")

    def shown(stream, **options):
        monkeypatch.setattr(sys, "stderr", stream)
        opt.save(tmp_path / "run", **options)
        return "saving" in stream.getvalue()

    assert shown(Terminal(), progress=True)
    assert not shown(Terminal())  # it is small
    monkeypatch.setattr(progress, "_LARGE", 1000)
    assert shown(Terminal())
    assert not shown(Terminal(), progress=False)
    assert not shown(io.StringIO())


# --- Errors -------------------------------------------------------------------------------------------------

JSON = "Convert it: x.tolist() of an array or a NumPy number."
PLAIN = "None, a bool, int, float, str, list or dict"
ERRORS = [
    ({"params": np.ones(N - 1)}, ValueError, f"params must have the size of the state ({N}); got {N - 1}."),
    ({"params": [1.0]}, TypeError, "params must be an array that shares its memory"),
    ({"loss_scale": 3.0}, TypeError, "loss_scale must be a DynamicLossScale; got float."),
    ({"extra": {1: 2}}, TypeError, "extra must have keys of str; got 1. JSON has no others."),
    ({"extra": {"a": [np.float32(1)]}}, TypeError, f"extra['a'][0] must be {PLAIN}; got float32. {JSON}"),
    ({"extra": object()}, TypeError, f"extra must be {PLAIN}; got object. {JSON}"),
    ({"progress": 1}, TypeError, "progress must be None, True, False or callable; got int."),
]


@pytest.mark.parametrize(("options", "error", "message"), ERRORS, ids=[row[2][:40] for row in ERRORS])
def test_errors_of_save(rng, tmp_path, options, error, message):
    opt, _ = saved(rng, tmp_path / "run", "plain")
    before = (tmp_path / "run").read_bytes()
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        opt.save(tmp_path / "run", **options)
    assert (tmp_path / "run").read_bytes() == before


LOAD_ERRORS = [
    ({"params": np.ones(3, np.float16)}, ValueError, f"params must have {N} elements; got 3."),
    ({"params": np.ones(N)}, TypeError, "params must be of the dtype that was saved, F16; got F64."),
    (
        {"shard": (0, N + 1)},
        ValueError,
        f"start and stop must be a part of the {N} elements; got 0 and {N + 1}.",
    ),
    ({"shard": (3, 2)}, ValueError, f"start and stop must be a part of the {N} elements; got 3 and 2."),
    ({"shard": (0, 100)}, ValueError, "stop must be a multiple of 128, as moments are in 8 bits; got 100."),
    ({"shard": (100, N)}, ValueError, "start must be a multiple of 128, as moments are in 8 bits; got 100."),
    ({"shard": (0.0, 9)}, TypeError, "start must be an integer; got float."),
    ({"progress": "yes"}, TypeError, "progress must be None, True, False or callable; got str."),
    (
        {"loss_scale": DynamicLossScale()},
        ValueError,
        "path must have a loss scale; got 'PATH', without. Save it: opt.save(path, loss_scale=...).",
    ),
    ({"lr": -1.0}, ValueError, "lr must be at least 0; got -1.0."),
    ({"loss_scale": 3.0}, TypeError, "loss_scale must be a DynamicLossScale; got float."),
]


@pytest.mark.parametrize(
    ("options", "error", "message"), LOAD_ERRORS, ids=[row[2][:40] for row in LOAD_ERRORS]
)
def test_errors_of_load(rng, tmp_path, options, error, message):
    saved(rng, tmp_path / "run", "stored")
    target = np.zeros(N, np.float16)
    message = message.replace("PATH", str(tmp_path / "run"))
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        FusedAdam.load(tmp_path / "run", **{"params": target, **options})
    assert not target.any()


def test_parameters_that_were_not_saved(tmp_path):
    FusedAdam().save(tmp_path / "run")
    path = tmp_path / "run"
    message = f"path must have parameters; got '{path}', without. Save them: opt.save(path, params=...)."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        FusedAdam.load(tmp_path / "run", params=np.zeros(3))


def test_a_bar_needs_rich(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "find_spec", lambda _: None)
    message = 'progress=True needs rich. pip install "fastadam[cli]"'
    with pytest.raises(ImportError, match=f"^{re.escape(message)}$"):
        FusedAdam().save(tmp_path / "run", progress=True)
    FusedAdam().save(tmp_path / "run")
