"""The folder of a race: ``race.json``, ``race.html`` and the pictures."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from fastadam.race import pictures, record, report
from fastadam.race.results import Result, Standing

RECORD, REPORT = "race.json", "race.html"


def require_output(folder: Path) -> None:
    """Raise ValueError unless files can be written there."""
    if folder.is_dir():
        if not os.access(folder, os.W_OK):
            raise ValueError(f"output must be a folder that can be written; got {folder}.")
    elif folder.exists():
        raise ValueError(f"output must be a folder; got {folder}, a file.")
    elif not folder.parent.is_dir():
        raise ValueError(f"output must be in a folder that exists; got {folder}.")
    elif not os.access(folder.parent, os.W_OK):
        raise ValueError(f"output must be in a folder that can be written; got {folder}.")


def write(
    result: Result, folder: Path, on_problem: Callable[[Standing], object] | None = None
) -> dict[str, list[pictures.Picture]]:
    """Draw all pictures and write all files; files of the same names are replaced.

    Parameters
    ----------
    result : Result
    folder : Path
        Made if it is not there.
    on_problem : callable, optional
        Called after the pictures of each problem.

    Returns
    -------
    dict
        Name of a problem -> its pictures, each in a file ``<problem>-<picture>.png``.
    """
    folder.mkdir(exist_ok=True)
    record.save(result, folder / RECORD)  # first: drawing takes longer
    drawn = {}
    for standing in result.standings:
        name = standing.problem.name
        drawn[name] = pictures.draw(standing)
        for picture in drawn[name]:
            (folder / f"{name}-{picture.name}.png").write_bytes(picture.png)
        if on_problem is not None:
            on_problem(standing)
    report.save(result, drawn, folder / REPORT)
    return drawn
