"""The command line: ``fastadam info``, ``fastadam demo``, ``fastadam race`` and ``fastadam bench``.

The interface only: it reads options, shows progress and prints. What takes long to import is imported by the
command that needs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from fastadam import __version__, devices
from fastadam.demo import Epoch, Settings
from fastadam.race.optimizers import OPTIMIZERS, Entrant
from fastadam.race.problem import Problem
from fastadam.race.problems import PROBLEMS
from fastadam.race.results import Run
from fastadam.race.settings import Settings as RaceSettings
from fastadam.race.settings import Tune

app = typer.Typer(
    help="Compiled-kernel Adam: one fused pass over any flat buffer, the same bits everywhere.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

_DEMO = Settings()
_RACE = RaceSettings()


class DeviceName(StrEnum):
    """Where arrays are."""

    CPU = "cpu"
    CUDA = "cuda"


class Dtype(StrEnum):
    """What buffers hold."""

    FLOAT32 = "float32"
    FLOAT64 = "float64"


def _open(device: DeviceName) -> devices.Device:
    return devices.CPU if device is DeviceName.CPU else devices.cuda()


@contextmanager
def _told(kind: type[Exception], *, exit_code: int) -> Iterator[None]:
    """Print an error of this kind without a traceback, and exit."""
    try:
        yield
    except kind as error:
        typer.echo(f"{kind.__name__}: {error}", err=True)
        raise typer.Exit(exit_code) from None


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fastadam {__version__}")
        raise typer.Exit


@app.callback()
def options(
    _version: Annotated[
        bool,
        typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Take the options that stand before a command."""


@app.command()
def info() -> None:
    """Show what a report of a problem should say: versions, CPU, threads, cache, backends, GPUs."""
    from fastadam import machine

    table = Table("What", "Value", title="fastadam on this machine", show_lines=False)
    table.columns[1].overflow = "fold"  # a path is to be copied whole
    for name, value in machine.facts().items():
        table.add_row(name, value)
    Console(markup=False, highlight=False).print(table)


@app.command()
def demo(
    seed: Annotated[int, typer.Option(help="Seed of the split, the weights and the batches.")] = _DEMO.seed,
    epochs: Annotated[int, typer.Option(help="Passes over the training digits.")] = _DEMO.epochs,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = _DEMO.lr,
    device: Annotated[
        DeviceName, typer.Option(help="Where to train; cuda needs CuPy and an NVIDIA GPU.")
    ] = DeviceName.CPU,
    output: Annotated[Path, typer.Option(help="Where the plot goes: a .png, .pdf or .svg file.")] = Path(
        "fastadam-demo.png"
    ),
) -> None:
    """Train a small network on handwritten digits and plot how it learns."""
    with _told(ImportError, exit_code=1):
        from fastadam import demo_plot
        from fastadam.demo import OPTIMIZER, load_digits, train

        with _told(ValueError, exit_code=2):
            settings = Settings(seed, epochs, lr)
            demo_plot.require_output(output)
        where = _open(device)
        digits = load_digits(settings.seed)

    console = Console(highlight=False)
    status = TextColumn("loss {task.fields[loss]:.4f}  test accuracy {task.fields[accuracy]:.2%}")
    columns = TextColumn("epoch"), BarColumn(), MofNCompleteColumn(), status, TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("epoch", total=settings.epochs, loss=float("nan"), accuracy=0.0)

        def show(epoch: Epoch) -> None:
            progress.update(task, advance=1, loss=epoch.loss, accuracy=epoch.accuracy)

        result = train(settings, digits, on_epoch=show, device=where)

    demo_plot.save(result, output)
    summary = Table.grid(padding=(0, 2))
    summary.add_row("trained on", where.label)
    summary.add_row("learning rate", repr(result.lr))
    summary.add_row("clipped to", f"a gradient norm of {OPTIMIZER['max_grad_norm']}")
    summary.add_row("test accuracy", f"{result.accuracy:.2%} of {digits.test_labels.size} digits")
    summary.add_row("of the average", f"{result.averaged_accuracy:.2%}")
    summary.add_row("time in step()", f"{result.step_share:.1%} of {result.train_seconds:.2f} s of training")
    summary.add_row("speed", f"{result.steps_per_second:,.0f} steps per second")
    console.print(summary)
    typer.echo(f"plot            {output}")  # not rich: it would wrap a long path


@app.command()
def race(
    problem: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(PROBLEMS)}; may be repeated.", show_default="all"),
    ] = None,
    optimizer: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(OPTIMIZERS)}; may be repeated.", show_default="all"),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Steps of a run.", show_default="what each problem recommends")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Starts, noises and batches, from --seed on.")] = _RACE.seeds,
    seed: Annotated[int, typer.Option(help="The first of the seeds.")] = _RACE.seed,
    tune: Annotated[
        Tune, typer.Option(help="Learning rates of each optimizer; none takes its default.")
    ] = _RACE.tune,
    trials: Annotated[int, typer.Option(help="How many learning rates of each.")] = _RACE.trials,
    output: Annotated[Path, typer.Option(help="Where report, pictures and numbers go: a folder.")] = Path(
        "fastadam-race"
    ),
) -> None:
    """Compare the relatives of Adam, and L-BFGS, on small problems: tables, pictures, a report."""
    with _told(ImportError, exit_code=1):
        from fastadam.race import output as files
        from fastadam.race import racing, tables

        with _told(ValueError, exit_code=2):
            chosen = tuple(problem or _RACE.problems), tuple(optimizer or _RACE.optimizers)
            settings = RaceSettings(*chosen, steps, seeds, seed, tune, trials)
            files.require_output(output)
        settings.require_packages()

    console = Console(highlight=False)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        runs = progress.add_task("runs", total=racing.count(settings))
        drawing = progress.add_task("pictures", total=len(settings.problems), start=False)

        def show(where: Problem, who: Entrant, _: Run) -> None:
            progress.update(runs, advance=1, description=f"{where.name}: {who.name}")

        result = racing.race(settings, on_run=show)
        progress.update(runs, description="runs")
        progress.start_task(drawing)
        files.write(result, output, on_problem=lambda _: progress.advance(drawing))

    for standing in result.standings:
        title = tables.caption(standing)
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        shown = [k for k in range(len(tables.COLUMNS)) if k != tables.RANGE]  # 80 characters have no room
        rows = [[row[k] for k in shown] for row in tables.rows(standing)]
        for k, cells in zip(shown, zip(*rows, strict=True), strict=True):
            table.add_column(
                tables.COLUMNS[k], justify="right" if k else "left", min_width=max(map(len, cells))
            )
        for row in rows:
            table.add_row(*row)
        console.print(table)
    console.print(tables.NOTE)
    typer.echo(f"report          {output / files.REPORT}")  # not rich: it would wrap a long path


@app.command()
def bench(
    size: Annotated[
        list[int] | None,
        typer.Option(help="Elements; may be repeated.", show_default="1 Ki, 64 Ki, 1 Mi, 16 Mi"),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="What the buffers hold.")] = Dtype.FLOAT32,
    rounds: Annotated[int, typer.Option(help="Turns that each contender gets.")] = 9,
    device: Annotated[
        DeviceName, typer.Option(help="Where the buffers are; cuda needs CuPy and an NVIDIA GPU.")
    ] = DeviceName.CPU,
) -> None:
    """Time a step against array expressions (NumPy, CuPy) and against the speed of the memory.

    Run it on an idle machine: threads that wait for each other on busy cores can take milliseconds.
    """
    from fastadam import benchmark, machine

    sizes = size or benchmark.SIZES
    with _told(ValueError, exit_code=2):
        benchmark.require_options(sizes, rounds)
    with _told(ImportError, exit_code=1):
        where = _open(device)

    if where is devices.CPU:
        rival, bound = "NumPy", "a loop"
        place = f"{machine.cpu()}. Threads: {machine.threads_used()}."
    else:
        rival, bound = "CuPy", "a copy within its memory"
        place = f"{where.label}."
    title = f"FusedAdam.step, {dtype}"
    table = Table("elements", "time", "GB/s", f"times faster than {rival}", "of roofline", title=title)
    table.caption = (
        f"{place} Medians of {rounds} rounds. {benchmark.bytes_per_element(dtype)} bytes per element;"
        f" roofline: {bound} that moves as many."
    )
    for column in table.columns:
        column.justify = "right"
    console = Console(highlight=False)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=rounds * len(sizes))
        for elements in sizes:
            progress.update(task, description=f"{elements:,} elements")
            row = benchmark.measure(
                elements, dtype, rounds=rounds, on_round=lambda: progress.advance(task), device=where
            )
            table.add_row(
                f"{row.size:,}",
                f"{row.microseconds:,.1f} us",
                f"{row.gigabytes_per_second:.1f}",
                f"{row.times_numpy:.1f}x",
                f"{row.of_roofline:.0%}",
            )
    console.print(table)
