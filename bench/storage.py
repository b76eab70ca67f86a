"""``python -m bench.storage``: a step by how its numbers are stored, beside our float32 step and the memory.

Moments in 16 and 8 bits beside float32 parameters; bfloat16 parameters and gradients; both beside our step of
float32 alone and beside kernels that move as many bytes. Then 8-bit Adams of others, at sizes that they can
take; and the whole phase with a bfloat16 copy of the parameters, beside PyTorch's calls.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numba
import typer
from rich.console import Console
from rich.table import Table

from bench import contest, environment, harness, phase_oracle, phase_roofline, roofline, storage_peers
from bench.contest import Contest
from bench.environment import Result
from bench.storage_peers import COPY, EIGHT_BIT, PARAMS, STATES, Stored
from bench.units import format_size, format_time, parse_size

IN_CACHE, LARGE = 2**18, 2**26

PROMISES = {
    "bfloat16": 1 / 1.35,
    "bfloat16 nearest": 1 / 1.35,
    "8bit": 1 / 1.55,
    "8bit nearest": 1 / 1.6,
}
"""Storage of the state -> at most this much of the time of float32 it takes at LARGE."""

CACHED_PROMISE = 1 / 0.75
"""The same at IN_CACHE, for all of them."""

PARAMS_PROMISES = {("8bit, split master", LARGE): 1 / 1.8}


class Work(NamedTuple):
    """A contest, at which sizes it takes place, and on how many threads."""

    contest: Contest
    sizes: tuple[str, ...]
    quick_sizes: tuple[str, ...]
    reference: str | None = None
    """Whose time all times are divided by; None where that of "fastadam" is divided by all."""
    one_thread_to: int = 0
    """Sizes that fit the cache of a core: on one thread they show what the arithmetic costs."""


def _by_storage(peers: Mapping[str, Any], promises: dict[tuple[str, int], float]) -> Work:
    check = storage_peers.checks(peers)
    sizes = (format_size(IN_CACHE), format_size(LARGE))
    found = Contest(peers, check, roofline.bytes_moved, promises)
    return Work(found, sizes, ("1Ki", "64Ki"), "float32", IN_CACHE)


def _copied_bytes(size: int, dtype: str) -> int:
    return phase_roofline.bytes_moved(size, dtype) + 2 * size


WORKS = {
    "float32 parameters and gradients": _by_storage(
        STATES,
        {(name, LARGE): most for name, most in PROMISES.items()}
        | {(name, IN_CACHE): CACHED_PROMISE for name in PROMISES},
    ),
    "bfloat16 parameters and gradients": _by_storage(PARAMS, PARAMS_PROMISES),
    "8-bit moments": Work(
        Contest(
            EIGHT_BIT,
            storage_peers.checks(EIGHT_BIT),
            roofline.bytes_moved,
            {(name, size): 1 / 30 for name in ("torchao", "bitsandbytes") for size in (2**20, 2**22)},
        ),
        ("1Mi", "4Mi"),
        ("4Ki",),
    ),
    "whole phase with a copy": Work(
        Contest(COPY, phase_oracle.check_phase_with_copy, _copied_bytes, {("torch", LARGE): 0.5}),
        ("1Mi", "64Mi"),
        ("1Ki", "64Ki"),
    ),
}

app = typer.Typer(add_completion=False)


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    """Take steps on so many of Numba's threads."""
    before = numba.get_num_threads()
    numba.set_num_threads(count)
    try:
        yield
    finally:
        numba.set_num_threads(before)


def skipped_of(work: Work) -> dict[str, str]:
    """Return who of a contest cannot take part, and why."""
    reasons = {name: peer.missing("float32") for name, peer in work.contest.peers.items()}
    used = {
        f"traffic {peer.storage.bytes_moved:g}"
        for name, peer in work.contest.peers.items()
        if isinstance(peer, Stored) and peer.is_adam and reasons[name] is None
    }
    for name in reasons:
        if name.startswith("traffic ") and name not in used:
            reasons[name] = "nobody moves as many bytes"
    return {name: reason for name, reason in reasons.items() if reason is not None}


def measure(work: Work, names: list[str], size: int, **how: Any) -> list[dict[str, Any]]:
    """Time contenders at one size; return a row for each, plain values."""
    threads = 1 if size <= work.one_thread_to else numba.get_num_threads()
    with on_threads(threads):
        if work.reference is None:
            rows = contest.measure(work.contest, names, size, "float32", **how)
            return [{"threads": threads, **row} for row in rows]
        measured = contest.clock(work.contest, names, size, "float32", **how)
    return [
        {"threads": threads, **_row(work.contest, work.reference, name, size, measured)} for name in names
    ]


def _row(
    found: Contest, reference: str, name: str, size: int, measured: harness.Measurement
) -> dict[str, Any]:
    peer, seconds = found.peers[name], measured.median(name)
    assert isinstance(peer, Stored)
    bytes_moved = peer.storage.bytes_moved
    return {
        "size": size,
        "peer": name,
        "label": peer.name,
        "seconds": seconds,
        "bytes_per_element": bytes_moved,
        "gb_per_second": bytes_moved * size / seconds * 1e-9,
        "over_reference": measured.ratio(name, over=reference)._asdict(),
        "over_traffic": measured.ratio(name, over=f"traffic {bytes_moved:g}")._asdict(),
        "target": found.target(name, size, "float32"),
    }


def add_rows(table: Table, rows: Iterable[dict[str, Any]]) -> None:
    """Show the rows of one size."""
    for row in rows:
        ratio, target = row["over_reference"], row["target"]
        met = target is not None and ratio["median"] <= target
        table.add_row(
            format_size(row["size"]),
            row["label"],
            format_time(row["seconds"]),
            f"{row['gb_per_second']:.0f}",
            f"{ratio['median']:.3f}",
            f"{row['over_traffic']['median']:.2f}",
            "" if target is None else f"{target:.2f} " + ("[green]met" if met else "[red]missed"),
        )
    table.add_section()


def new_table(title: str) -> Table:
    """Return the table that :func:`add_rows` fills."""
    table = Table(title=title)
    for header in ("Size", "Storage", "Time", "GB/s", "/ float32", "/ traffic", "Target"):
        table.add_column(header, no_wrap=True, justify="left" if header == "Storage" else "right")
    return table


@app.command()
def main(
    size: Annotated[
        list[int] | None, typer.Option(parser=parse_size, help="Elements; default: those of each contest.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Blocks of each contender after each start.")] = 5,
    starts: Annotated[int, typer.Option(min=1, help="Times that all start again, in new memory.")] = 5,
    work: Annotated[list[str] | None, typer.Option(help=f"Of: {', '.join(WORKS)}; default: all.")] = None,
    quick: Annotated[bool, typer.Option(help="Smoke test: small sizes, 2 rounds of short blocks.")] = False,
    output: Annotated[Path | None, typer.Option(help="JSON file; default: in bench/results.")] = None,
) -> None:
    """Compare steps by how their numbers are stored."""
    console = Console()
    unknown = [name for name in work or () if name not in WORKS]
    if unknown:
        raise typer.BadParameter(f"--work must be of {', '.join(WORKS)}; got {', '.join(unknown)}.")
    starts, rounds, blocks = (1, 2, harness.QUICK) if quick else (starts, rounds, harness.Blocks())
    skipped: dict[str, dict[str, str]] = {}
    rows: list[dict[str, Any]] = []
    packages: dict[str, None] = {}
    for title in work or WORKS:
        chosen = WORKS[title]
        skipped[title] = skipped_of(chosen)
        for name, reason in skipped[title].items():
            console.print(f"[yellow]without {chosen.contest.peers[name].name}: {reason}", highlight=False)
        names = [name for name in chosen.contest.peers if name not in skipped[title]]
        if (chosen.reference or "fastadam") not in names:
            continue
        packages |= dict.fromkeys(p for name in names for p in chosen.contest.peers[name].packages)
        table = contest.new_table(title) if chosen.reference is None else new_table(title)
        for elements in size or map(parse_size, chosen.quick_sizes if quick else chosen.sizes):
            with console.status(f"{title}, {format_size(elements)} elements"):
                of_size = measure(chosen, names, elements, starts=starts, rounds=rounds, blocks=blocks)
            (contest.add_rows if chosen.reference is None else add_rows)(table, of_size)
            rows += [{"work": title, **row} for row in of_size]
        console.print(table)

    result: Result = {
        "kind": "storage",
        "environment": environment.environment(packages),
        "dtype": "float32",
        "rounds": starts * rounds,
        "skipped": {title: reasons for title, reasons in skipped.items() if reasons},
        "rows": rows,
    }
    console.print(f"wrote {environment.save(result, output).name}")


if __name__ == "__main__":
    app()
