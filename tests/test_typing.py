"""What a strict type checker accepts runs, and what it refuses fails.

``ci/check.sh`` checks ``tests/typing`` by ``mypy --strict`` beside the installed wheel. Where it must refuse
a line, an ignore stands, and one that is not needed is an error.
"""

from __future__ import annotations

import inspect
import runpy
import typing
from pathlib import Path

import pytest

import fastadam
from fastadam import arrays, buffers

FOLDER = Path(__file__).parent / "typing"
NEEDS_A_GPU = {"streams"}
REFUSED = runpy.run_path(str(FOLDER / "refused.py"))["REFUSED"]


def programs():
    for path in sorted(FOLDER.glob("accepted*.py")):
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("def ") and line.endswith("() -> None:"):
                yield pytest.param(path, line[4:].partition("(")[0], id=f"{path.stem}-{line[4:-11]}")


@pytest.mark.parametrize(("path", "name"), list(programs()))
def test_what_is_accepted_runs(path, name):
    package = path.stem.partition("_")[2]
    if package:
        pytest.importorskip(package)
    runpy.run_path(str(path))[name]()


def test_all_programs_are_found():
    functions = {
        line[4:].partition("(")[0]
        for path in FOLDER.glob("accepted*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.startswith("def ")
    }
    found = {param.values[1] for param in programs()}
    assert functions - found == {"a_function_of_a_user", *NEEDS_A_GPU}
    assert len(found) > 8


@pytest.mark.parametrize("call", REFUSED, ids=[str(k) for k in range(len(REFUSED))])
def test_what_is_refused_fails(call):
    with pytest.raises((TypeError, ValueError)):
        call()


def signatures():
    opt = fastadam.FusedAdam
    return [opt.__init__, opt.step, opt.accumulate, opt.swap_ema, opt.load_state_dict, fastadam.warmup]


@pytest.mark.parametrize("function", signatures(), ids=lambda function: function.__name__)
def test_signatures_say_what_they_take(function):
    """No argument is any object, and what stands in a signature can be looked up when a program runs."""
    hints = typing.get_type_hints(function)
    assert hints.keys() >= inspect.signature(function).parameters.keys() - {"self"}
    assert [name for name, hint in hints.items() if hint is object] == []


def test_warmup_takes_the_hyperparameters():
    of_adam, _ = typing.get_overloads(fastadam.warmup)
    (hint,) = typing.get_args(typing.get_type_hints(of_adam)["hyperparameters"])
    own = typing.get_type_hints(fastadam.FusedAdam.__init__)
    own.pop("return")
    assert typing.get_type_hints(hint) == own


def test_names_are_those_that_are_checked():
    """The literals of the signatures are all that the checks let pass."""
    choices = {
        "state_dtype": arrays.StateFormat,
        "master_params": arrays.MasterFormat,
        "rounding": arrays.Rounding,
        "backend": arrays.BackendName,
    }
    for name, literal in choices.items():
        told = typing.get_args(literal)
        with pytest.raises(ValueError, match=f"{name} must be ") as error:
            fastadam.FusedAdam(**{name: "other"})
        said = [part for part in str(error.value).partition("; got")[0].split("'")[1::2] if part]
        assert tuple(said) == told


class Exporter:
    """Nothing but one protocol: no array of any library."""

    def __init__(self, array):
        self._array = array


class DLPackExporter(Exporter):
    def __dlpack__(self, **options):
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()


class InterfaceExporter(Exporter):
    @property
    def __array_interface__(self):
        return self._array.__array_interface__


@pytest.mark.parametrize("kind", [DLPackExporter, InterfaceExporter])
def test_a_protocol_is_enough(rng, kind):
    """What the protocols of :mod:`fastadam.arrays` ask for is all that a step asks for."""
    array = rng.standard_normal(5)
    before = array.copy()
    fastadam.FusedAdam(lr=0.1).step(kind(array), before)
    assert (array != before).all()
    assert buffers.flat(kind(array), "x", writable=True).ctypes.data == array.ctypes.data
