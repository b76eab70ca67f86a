"""A comparison: who takes part, what each must compute, what fastadam promises, and how it is measured."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from bench import harness, oracle
from bench.oracle import Array, Contender
from bench.peers import Peer
from bench.placement import placed_copy
from bench.units import format_size, format_time


class Contest(NamedTuple):
    """Contenders that do the same work; one of them is ``"fastadam"``."""

    peers: Mapping[str, Peer]
    check: Callable[[str, Contender, Array, Array], object]
    """``(name, contender, params, grads)``: raises WrongUpdateError."""
    bytes_moved: Callable[[int, str], int]
    """``(size, dtype)`` -> what the work must read and write."""
    promises: Mapping[tuple[str, int], float]
    """``(peer, size)`` -> at most this much of the peer's time is fastadam's, in float32."""

    def target(self, peer: str, size: int, dtype: str) -> float | None:
        """Return what fastadam promises beside a peer, or None."""
        return self.promises.get((peer, size)) if dtype == "float32" else None


def start_all(
    contest: Contest, names: list[str], size: int, dtype: str, seed: int
) -> dict[str, harness.Task]:
    """Start contenders on buffers of their own, in an order that the seed gives, and check them.

    Raises
    ------
    WrongUpdateError
        If one does not compute what the contest is about.
    """
    params, grads = oracle.inputs(size, dtype, seed)
    tasks: dict[str, harness.Task] = {}
    for name in np.random.default_rng(seed).permutation(names).tolist():
        peer = contest.peers[name]
        contender = peer.start(placed_copy(params), placed_copy(grads))
        if peer.is_adam:
            contest.check(name, contender, params, grads)
        tasks[name] = harness.Task(contender.step, contender.before)
    return tasks


def clock(
    contest: Contest,
    names: list[str],
    size: int,
    dtype: str,
    *,
    starts: int,
    rounds: int,
    blocks: harness.Blocks,
) -> harness.Measurement:
    """Start, check and time contenders at one size.

    They are started several times, because of what :mod:`bench.placement` says.
    """
    parts = []
    for seed in range(starts):
        tasks = start_all(contest, names, size, dtype, seed)
        parts.append(harness.interleave(tasks, rounds=rounds, blocks=blocks, seed=seed))
        del tasks
        gc.collect()  # the libraries' reference cycles would keep gigabytes until the next start
    return harness.Measurement.pooled(parts)


def measure(
    contest: Contest,
    names: list[str],
    size: int,
    dtype: str,
    *,
    starts: int,
    rounds: int,
    blocks: harness.Blocks,
) -> list[dict[str, Any]]:
    """Do what :func:`clock` does.

    Returns
    -------
    list of dict
        One row for each contender, plain values. ``fastadam_over_peer`` are the quartiles of the time of
        fastadam over the contender's.
    """
    measured = clock(contest, names, size, dtype, starts=starts, rounds=rounds, blocks=blocks)
    rows = []
    for name in names:
        seconds = measured.median(name)
        rows.append(
            {
                "size": size,
                "peer": name,
                "label": contest.peers[name].name,
                "seconds": seconds,
                "gb_per_second": contest.bytes_moved(size, dtype) / seconds * 1e-9,
                "fastadam_over_peer": measured.ratio("fastadam", over=name)._asdict(),
                "target": contest.target(name, size, dtype),
            }
        )
    return rows


def new_table(title: str | None = None) -> Table:
    """Return the table that :func:`add_rows` fills."""
    table = Table(title=title)
    for header in ("Size", "Contender"):
        table.add_column(header, no_wrap=True)
    for header in ("Time", "GB/s", "fastadam / it", "Target"):
        table.add_column(header, no_wrap=True, justify="right")
    return table


def add_rows(table: Table, rows: list[dict[str, Any]]) -> None:
    """Show the rows of one size."""
    for row in rows:
        ratio, promised = row["fastadam_over_peer"], row["target"]
        met = promised is not None and ratio["median"] <= promised
        table.add_row(
            format_size(row["size"]),
            row["label"],
            format_time(row["seconds"]),
            f"{row['gb_per_second']:.0f}",
            f"{ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]",
            "" if promised is None else f"{promised:.2f} " + ("[green]met" if met else "[red]missed"),
        )
    table.add_section()
