"""The tables of docs/migration.md have every argument of the optimizers they are about, with its default."""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

import fastadam

PAGE = (Path(__file__).parents[1] / "docs" / "migration.md").read_text(encoding="utf-8")
REQUIRED = "required"


def code(cell):
    return re.findall(r"`([^`]*)`", cell)


def tables(text):
    """Header and rows of each table, cells without blanks around them."""
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
        yield rows[0], rows[2:]


def documented(text=PAGE):
    """Optimizer -> argument -> default, or REQUIRED, from the columns that an optimizer heads."""
    found = {}
    for header, rows in tables(text):
        for k, name in enumerate(header):
            if code(name):
                cells = {code(row[0])[0]: row[k] for row in rows if row[k]}
                found[code(name)[0]] = {
                    argument: cell if cell == REQUIRED else ast.literal_eval(code(cell)[0])
                    for argument, cell in cells.items()
                }
    return found


def arguments(function):
    return {
        name: REQUIRED if parameter.default is parameter.empty else parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD
    }


def apex(
    params,
    lr=1e-3,
    bias_correction=True,
    betas=(0.9, 0.999),
    eps=1e-8,
    adam_w_mode=True,
    weight_decay=0.0,
    amsgrad=False,
    set_grad_none=True,
    capturable=False,
    master_weights=False,
):
    """apex.optimizers.FusedAdam, which cannot be installed from wheels; as its documentation has it."""


def keras(
    learning_rate=0.001,
    beta_1=0.9,
    beta_2=0.999,
    epsilon=1e-7,
    amsgrad=False,
    weight_decay=None,
    clipnorm=None,
    clipvalue=None,
    global_clipnorm=None,
    use_ema=False,
    ema_momentum=0.99,
    ema_overwrite_frequency=None,
    loss_scale_factor=None,
    gradient_accumulation_steps=None,
    name="adam",
    **kwargs,
):
    """keras.optimizers.Adam of Keras 3; AdamW has two other defaults."""


PUBLISHED = {
    "apex.optimizers.FusedAdam": arguments(apex),
    "keras.optimizers.Adam": arguments(keras),
    "keras.optimizers.AdamW": arguments(keras) | {"weight_decay": 0.004, "name": "adamw"},
}
"""What can be compared without the library."""

# In a process of its own: some of them warn, log and change settings when they are imported.
_ASK = """
import importlib, inspect, json, sys
def arguments(path):
    module, _, name = path.rpartition(".")
    parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters.values()
    return {p.name: "required" if p.default is p.empty else p.default for p in parameters}
found = {path: arguments(path) for path in sys.argv[1:]}
if "deepspeed.ops.adam.FusedAdam" in found:
    from deepspeed.runtime import constants, precision_config as precision
    for kind in ("fp16", "bf16"):
        fields = getattr(precision, f"DeepSpeed{kind.upper()}Config").model_fields
        found |= {f"{kind}.{name}": field.default for name, field in fields.items()}
    found["gradient_clipping"] = constants.GRADIENT_CLIPPING_DEFAULT
    found["gradient_accumulation_steps"] = constants.GRADIENT_ACCUMULATION_STEPS_DEFAULT
print("\\n" + json.dumps(found))
"""


@cache
def installed(library):
    """What the optimizers of a library that are documented really are, and DeepSpeed's configuration."""
    if find_spec(library) is None:
        pytest.skip(f"needs {library}")
    paths = [path for path in documented() if path.partition(".")[0] == library]
    command = [sys.executable, "-W", "ignore", "-c", _ASK, *paths]
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout
    return json.loads(output.splitlines()[-1])


def as_json(value):
    return json.loads(json.dumps(value))  # tuples are lists


@pytest.mark.parametrize("library", ["torch", "deepspeed", "bitsandbytes", "optax", "keras"])
def test_tables_have_the_arguments_of_what_is_installed(library):
    real = installed(library)
    found = {path: table for path, table in documented().items() if path in real}
    assert found
    assert as_json(found) == {path: table for path, table in real.items() if path in found}


@pytest.mark.parametrize("path", PUBLISHED)
def test_tables_have_the_published_arguments(path):
    assert documented()[path] == PUBLISHED[path]


def configuration():
    """DeepSpeed's entry -> default, those that have one."""
    rows = next(rows for header, rows in tables(PAGE) if header[0] == "entry")
    return {code(row[0])[0]: ast.literal_eval(code(row[1])[0]) for row in rows if row[1]}


def test_deepspeeds_configuration():
    real = installed("deepspeed")
    found = configuration()
    names = [name for name in real if not name.startswith("deepspeed.")]
    assert len(names) > 10
    assert {name: found.get(name, "missing") for name in names} == {name: real[name] for name in names}


def test_every_library_has_a_table():
    libraries = [path.partition(".")[0] for path in documented()]
    assert set(libraries) == {"torch", "apex", "deepspeed", "bitsandbytes", "optax", "keras"}


def test_what_it_is_here_exists():
    of_adam = inspect.signature(fastadam.FusedAdam).parameters.keys()
    of_step = inspect.signature(fastadam.FusedAdam.step).parameters.keys()
    of_scale = inspect.signature(fastadam.DynamicLossScale).parameters.keys()
    names = {*of_adam, *of_step, "accumulate", "swap_ema", "step"}
    names |= {f"DynamicLossScale({name})" for name in of_scale} | {"betas[0]", "betas[1]"}
    assert hasattr(fastadam.FusedAdam, "accumulate")
    assert hasattr(fastadam.FusedAdam, "swap_ema")
    here = [
        name
        for header, rows in tables(PAGE)
        if "what differs" in header
        for row in rows
        for name in code(row[header.index("here")])
    ]
    assert len(here) > 50
    assert [name for name in here if name not in names] == []


@pytest.mark.parametrize(
    ("there", "instead"),
    [("| `epsilon` | `1e-7` |", "| `epsilon` | `1e-8` |"), ("| `clipnorm` | `None` |", "| `clipnorm` | |")],
)
def test_another_default_and_a_missing_argument_are_seen(there, instead):
    assert PAGE.count(there) == 1
    path = "keras.optimizers.Adam"
    assert documented(PAGE.replace(there, instead))[path] != PUBLISHED[path]
