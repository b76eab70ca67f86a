"""The report of a race: one HTML file, which needs no other file, no network and no script."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from fastadam.race import record, tables
from fastadam.race.pictures import Picture
from fastadam.race.results import Entry, Result, Standing

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #111827; background: #fff; margin: 0 auto;
  max-width: 70rem; padding: 1rem 1.25rem 4rem; }
h1, h2, h3 { line-height: 1.2; }
h2 { margin-top: 3rem; border-top: 2px solid #e5e7eb; padding-top: 1.5rem; }
a { color: #1d4ed8; }
nav ul { padding-left: 1.25rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 0.9rem; }
caption { text-align: left; font-weight: 600; padding: 0.5rem 0; }
th, td { padding: 0.3rem 0.6rem; text-align: right; border-bottom: 1px solid #e5e7eb; white-space: nowrap; }
th:first-child { text-align: left; }
thead th { border-bottom: 2px solid #6b7280; white-space: normal; vertical-align: bottom; }
figure { margin: 1.5rem 0; }
figure img { max-width: 100%; height: auto; display: block; }
figcaption, .note { color: #4b5563; font-size: 0.9rem; }
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>fastadam race</title>
<style>{style}</style>
</head>
<body>
<header>
<h1>fastadam race</h1>
<p>{summary}</p>
<nav aria-label="Problems"><ul>
{contents}
</ul></nav>
</header>
<main>
{problems}
</main>
<footer>
<h2>How this was made</h2>
{facts}
</footer>
</body>
</html>
"""


def save(result: Result, pictures: Mapping[str, Sequence[Picture]], path: Path) -> None:
    """Write the report; a file there is replaced.

    Parameters
    ----------
    result : Result
    pictures : mapping
        Name of a problem -> its pictures.
    path : Path
    """
    path.write_text(page(result, pictures), encoding="utf-8")


def page(result: Result, pictures: Mapping[str, Sequence[Picture]]) -> str:
    """Return the report."""
    settings = result.settings
    runs = sum(entry.runs for standing in result.standings for entry in standing.entries)
    return _PAGE.format(
        style=_STYLE,
        summary=escape(
            f"{len(settings.optimizers)} optimizers on {len(settings.problems)} problems, {runs:,} runs:"
            f" {settings.seeds} seeds from {settings.seed} on, {_tuning(result)}."
        ),
        contents="\n".join(
            f'<li><a href="#{escape(standing.problem.name)}">{escape(standing.problem.title)}</a>:'
            f" {escape(_winner(standing))}</li>"
            for standing in result.standings
        ),
        problems="\n".join(
            _section(standing, pictures[standing.problem.name]) for standing in result.standings
        ),
        facts=_facts(result),
    )


def _tuning(result: Result) -> str:
    counts = {len(entry.trials) for standing in result.standings for entry in standing.entries}
    how = {"grid": "from a grid", "random": "drawn at random", "none": "the default"}
    return f"{max(counts)} learning rate{'s' * (max(counts) > 1)} of each, {how[result.settings.tune]}"


def _winner(standing: Standing) -> str:
    tuned = [entry for entry in standing.ranked if entry.entrant.is_tuned] or standing.ranked
    return f"{tuned[0].entrant.title}, {tables.loss_text(tuned[0].chosen.final)}"


def _section(standing: Standing, pictures: Sequence[Picture]) -> str:
    problem = standing.problem
    parts = [
        f'<section aria-labelledby="{escape(problem.name)}">',
        f'<h2 id="{escape(problem.name)}">{escape(problem.title)}</h2>',
        f"<p>{escape(problem.lesson)}</p>",
        _table(standing),
        f'<p class="note">{escape(tables.NOTE)}{escape(_prescribed(standing.entries))}</p>',
        *(_figure(picture) for picture in pictures),
        "</section>",
    ]
    return "\n".join(parts)


def _prescribed(entries: Sequence[Entry]) -> str:
    """Return what optimizers were given, so that nobody has to guess."""
    given = [
        f"{entry.entrant.name} {', '.join(f'{name}={value}' for name, value in entry.arguments.items())}"
        for entry in entries
        if entry.arguments
    ]
    return f" Arguments other than the defaults: {'; '.join(given)}." if given else ""


def _table(standing: Standing) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in tables.COLUMNS)
    lines = []
    for name, *values in tables.rows(standing):
        cells = "".join(f"<td>{escape(value)}</td>" for value in values)
        lines.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    # A wide table scrolls by itself on a narrow screen; by keyboard, too.
    caption = escape(tables.caption(standing))
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{caption}"><table>'
        f"<caption>{caption}</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n"
        + "\n".join(lines)
        + "\n</tbody></table></div>"
    )


def _figure(picture: Picture) -> str:
    data = b64encode(picture.png).decode("ascii")
    return (
        f'<figure><img alt="{escape(picture.alt)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
    )


def _facts(result: Result) -> str:
    versions = {name: version for name, version in record.versions().items() if version is not None}
    arguments = {name: _plain(value) for name, value in record.arguments(result.settings).items()}
    listed = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>"
        for name, value in {**versions, **arguments}.items()
    )
    return f"<dl>{listed}</dl>"


def _plain(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return "as each problem recommends" if value is None else str(value)
