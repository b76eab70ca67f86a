"""Pieces of the Markdown that shows results."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from bench.environment import Result


def table(header: list[str], rows: Iterable[list[str]]) -> str:
    """Return a table, numbers to the right."""
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def met(value: float, target: float) -> str:
    """Say whether a value is at most its target."""
    return "met" if value <= target else "**missed**"


def quartiles(ratio: dict[str, float], digits: int) -> str:
    """Return a median and its quartiles."""
    low, median, high = (f"{ratio[key]:.{digits}f}" for key in ("low", "median", "high"))
    return f"{median} ({low} to {high})"


def origin(result: Result) -> str:
    """Say where the numbers come from."""
    environment: dict[str, Any] = result["environment"]
    machine = environment["machine"]
    memory = f", {machine['memory_gib']} GiB" if machine["memory_gib"] else ""
    gpu = environment.get("gpu")
    facts = [
        *([_gpu(gpu)] if gpu else []),
        f"{machine['cpu']} ({machine['architecture']}), {machine['cores']} cores{memory}",
        environment["os"],
        f"Python {environment['python']}",
        ", ".join(f"{name} {version}" for name, version in environment["versions"].items()),
        f"threads: {environment['threading_layer']}",
        *([f"median of {result['rounds']} rounds, with quartiles"] if "rounds" in result else []),
        environment["date"],
        *([f"commit {environment['commit']}"] if environment["commit"] else []),
    ]
    return f"<sub>{'; '.join(facts)}.</sub>\n"


def _gpu(gpu: dict[str, Any]) -> str:
    driver = f"driver {gpu['driver']}, " if gpu["driver"] else ""
    return (
        f"{gpu['name']}, {gpu['memory_gib']} GiB, {gpu['multiprocessors']} SMs, L2 {gpu['l2_mib']} MiB,"
        f" {driver}CUDA {gpu['cuda_driver']} (runtime {gpu['cuda_runtime']})"
    )
