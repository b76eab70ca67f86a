"""``python -m bench.phase``: clip, step, average and clear, beside PyTorch's calls and the memory roofline.

The whole phase; the pass over the gradients that it begins with; what 10,000 segments and what telemetry add
to a step; and, for context, a step with nothing asked for (``bench.compare`` has more of that).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from bench import environment, harness, oracle, phase_oracle, phase_roofline, roofline
from bench.contest import Contest, add_rows, measure, new_table
from bench.environment import Result
from bench.peers import PEERS
from bench.phase_peers import NORM, PHASE
from bench.segment_peers import SEGMENTS, TELEMETRY
from bench.units import format_size, parse_size

SIZES = ("1Ki", "1Mi", "32Mi")
QUICK_SIZES = ("1Ki", "64Ki")

CONTESTS = {
    "whole phase": Contest(
        PHASE,
        phase_oracle.check_phase,
        phase_roofline.bytes_moved,
        {("torch", 2**25): 0.55, ("roofline", 2**25): 1.08},
    ),
    "norm alone": Contest(NORM, phase_oracle.check_norm, phase_roofline.bytes_read, {("torch", 2**25): 0.55}),
    "segments": Contest(SEGMENTS, oracle.check_update, roofline.bytes_moved, {("plain", 2**25): 1.10}),
    "telemetry": Contest(TELEMETRY, oracle.check_update, roofline.bytes_moved, {("plain", 2**25): 1.10}),
    "plain step": Contest(
        {name: PEERS[name] for name in ("fastadam", "roofline", "torch")},
        oracle.check_update,
        roofline.bytes_moved,
        {},
    ),
}

app = typer.Typer(add_completion=False)


@app.command()
def main(
    size: Annotated[
        list[int] | None, typer.Option(parser=parse_size, help=f"Elements; default: {' '.join(SIZES)}.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Blocks of each contender after each start.")] = 5,
    starts: Annotated[int, typer.Option(min=1, help="Times that all start again, in new memory.")] = 5,
    quick: Annotated[bool, typer.Option(help="Smoke test: small sizes, 2 rounds of short blocks.")] = False,
    output: Annotated[Path | None, typer.Option(help="JSON file; default: in bench/results.")] = None,
) -> None:
    """Compare the whole optimizer phase with PyTorch's and with the memory roofline."""
    console = Console()
    starts, rounds, blocks = (1, 2, harness.QUICK) if quick else (starts, rounds, harness.Blocks())
    skipped: dict[str, str] = {}
    rows: list[dict[str, Any]] = []
    for work, contest in CONTESTS.items():
        reasons = {name: peer.missing("float32") for name, peer in contest.peers.items()}
        skipped |= {name: reason for name, reason in reasons.items() if reason is not None}
        table = new_table(work)
        for elements in size or map(parse_size, QUICK_SIZES if quick else SIZES):
            names = [name for name in reasons if name not in skipped]
            with console.status(f"{work}, {format_size(elements)} elements"):
                of_size = measure(
                    contest, names, elements, "float32", starts=starts, rounds=rounds, blocks=blocks
                )
            add_rows(table, of_size)
            rows += [{"work": work, **row} for row in of_size]
        console.print(table)

    result: Result = {
        "kind": "phase",
        "environment": environment.environment(() if "torch" in skipped else ("torch",)),
        "dtype": "float32",
        "rounds": starts * rounds,
        "skipped": skipped,
        "rows": rows,
    }
    console.print(f"wrote {environment.save(result, output).name}")


if __name__ == "__main__":
    app()
