"""What imports what: the floors of the house, and how little `import fastadam` loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fastadam
from fastadam import kernels

SOURCES = {
    **{path.stem: path for path in Path(fastadam.__file__).parent.glob("*.py")},
    **{f"kernels.{path.stem}": path for path in Path(kernels.__file__).parent.glob("*.py")},
    **{f"race.{path.stem}": path for path in Path(fastadam.__file__).parent.glob("race/*.py")},
    **{f"torch.{path.stem}": path for path in Path(fastadam.__file__).parent.glob("torch/*.py")},
}

# Every module, from the ground up: a module imports only from floors below its own.
FLOORS = [
    {
        "arrays",
        "atomic",
        "bias_correction",
        "checks",
        "containers",
        "last_step",
        "libraries",
        "progress",
        "trees",
        "kernels.device_storage",
        "kernels.bits",
        "kernels.columns",
        "kernels.forks",
        "kernels.grids",
        "kernels.rounding",
        "kernels.rows",
        "kernels.rules",
        "kernels.tree",
    },
    {
        "attached",
        "momentum_schedule",
        "precision",
        "rectification",
        "rounding",
        "rule",
        "kernels.translation",
        "kernels.eight_bits",
        "kernels.formats",
        "kernels.relatives",
    },
    {
        "kernels.__init__",
        "kernels.bounds",
        "kernels.chunks",
        "kernels.draws",
        "formulas",
        "kernels.kinds",
        "kernels.storage",
        "kernels.units",
    },
    {"kernels.groups", "kernels.observed"},
    {"eight_bit", "kernels.distinct"},
    {"formats", "kernels.views"},
    {"kernels.elements"},
    {"kernels.compiling", "kernels.cubins", "kernels.cuda", "kernels.run_chunks", "kernels.threads"},
    {"kernels.block_tables", "kernels.cuda_block_views"},
    {
        "kernels.cuda_decide",
        "kernels.cuda_exact",
        "kernels.cuda_loop",
        "kernels.cuda_seen",
        "kernels.cuda_stored_source",
        "kernels.cuda_units",
    },
    {
        "kernels.cuda_clock",
        "kernels.cuda_source",
        "kernels.cuda_stored_loop",
        "kernels.cuda_units_decide",
    },
    {"kernels.cuda_block_elements", "kernels.cuda_units_loop", "kernels.norms"},
    {"kernels.cuda_block_limits"},
    {"kernels.cuda_blocks_loop"},
    {"kernels.cuda_blocks_observed"},
    {"kernels.cpu", "kernels.segment_norms", "kernels.touched"},
    {"kernels.cuda_cupy", "kernels.cuda_numba", "kernels.row_sums", "kernels.stored"},
    {"kernels.segments", "kernels.sparse_rows", "kernels.tensors"},
    {"kernels.device_tensors", "kernels.telemetry"},
    {"kernels.stored_telemetry"},
    {"backends", "hyperparameters", "schedule"},
    {"coefficients", "decays", "segments", "streams", "tunables"},
    {"compositions", "device_buffers", "flat", "rows"},
    {"buffers", "clocks", "schedules", "segmented"},
    {"documents", "loading", "sparse_rows"},
    {"state"},
    {"accumulation", "compiled_state", "compiled_steps", "loss_scale", "stored"},
    {"checkpoint", "device_stored"},
    {"device_steps", "resuming", "saving"},
    {"persistent"},
    {"optimizer"},
    {"adam", "adadelta", "adagrad", "adamax", "definitions", "rmsprop", "sgd"},
    {"lion", "nadam", "own_rule", "radam"},
    {"exchanged", "jax", "numba", "numba_cuda", "thinc", "warming"},
    {"exchange_hat", "exchange_optax", "exchange_torch"},
    {"exchange"},
    {"__init__"},
    {"torch.copies", "torch.options", "torch.queues", "torch.tensors"},
    {"torch.backward", "torch.bundles"},
    {"torch.chunks", "torch.device_bundles"},
    {"torch.plans"},
    {"torch.optimizer"},
    {"torch.offload"},
    {"torch.__init__"},
    {"demo_model", "devices", "machine"},
    {"benchmark", "demo"},
    {"demo_plot", "race.problem"},
    {"race.learning", "race.online", "race.optimizers", "race.surfaces"},
    {"race.problems"},
    {"race.settings"},
    {"race.results"},
    {"race.record", "race.runs", "race.tables", "race.tuning"},
    {"race.drawing", "race.lbfgs"},
    {"race.pictures", "race.racing"},
    {"race.__init__", "race.report"},
    {"race.output"},
    {"cli"},
    {"__main__"},
]
FLOOR = {module: number for number, floor in enumerate(FLOORS) for module in floor}


def imports(source, module):
    """Modules of fastadam that a source imports, at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {as_module(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # One level is the package of the module, and each further one the package of that.
            packages = f"fastadam.{module}".split(".")[: -node.level] if node.level else []
            origin = ".".join([*packages, *filter(None, [node.module])])
            found |= {as_module(f"{origin}.{alias.name}") or as_module(origin) for alias in node.names}
    return found - {None}


def as_module(name):
    """The key of SOURCES for an absolute name, or None."""
    if name in {"fastadam", "fastadam.kernels", "fastadam.race", "fastadam.torch"}:
        name += ".__init__"
    key = name.removeprefix("fastadam.")
    return key if name.startswith("fastadam.") and key in SOURCES else None


def violations(sources):
    return [
        (module, imported)
        for module, source in sources.items()
        for imported in imports(source, module)
        if FLOOR[imported] >= FLOOR[module]
    ]


def read_all():
    return {module: path.read_text(encoding="utf-8") for module, path in SOURCES.items()}


def test_every_module_has_its_floor():
    assert read_all().keys() <= FLOOR.keys()


def test_the_package_has_every_file_of_the_tree():
    """Installed from a wheel: a source of a GPU that it lacks would show only where that is compiled."""
    root = Path(__file__).resolve().parent.parent
    installed_in = Path(fastadam.__file__).parent
    for place, folder in (
        (installed_in, root / "fastadam"),
        (installed_in / "race", root / "fastadam" / "race"),
        (installed_in / "torch", root / "fastadam" / "torch"),
        (Path(kernels.__file__).parent, root / "kernels"),
    ):
        installed, wanted = (
            {path.name: path.read_bytes() for path in where.iterdir() if path.is_file()}
            for where in (place, folder)
        )
        assert installed.keys() == wanted.keys()
        assert installed == wanted


def test_modules_import_only_downward():
    assert violations(read_all()) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("kernels.rules", "from .cpu import step"),
        ("kernels.rules", "from . import compiling"),
        ("kernels.cpu", "from fastadam import buffers"),
        ("kernels.cpu", "from ..optimizer import FusedAdam"),
        ("kernels.cpu", "from .. import buffers"),
        ("kernels.cpu", "from .. import FusedAdam"),
        ("kernels.rules", "from ..kernels.cpu import step"),
        ("kernels.__init__", "from .compiling import jit"),
        ("kernels.__init__", "from .. import optimizer"),
        ("buffers", "from .optimizer import FusedAdam"),
        ("buffers", "from . import FusedAdam"),
        ("kernels.threads", "import fastadam.kernels.compiling"),
        ("buffers", "def f():\n    from fastadam.optimizer import FusedAdam"),
        ("state", "from fastadam import optimizer"),
        ("optimizer", "from fastadam.torch import FusedAdam"),
        ("torch.tensors", "from fastadam.torch.plans import Plan"),
        ("race.problem", "from fastadam.race import race"),
    ],
)
def test_the_floor_check_bites(module, line):
    assert violations({module: line}) != []


HEAVY = [
    "numba",
    "llvmlite",
    "cupy",
    "torch",
    "jax",
    "ml_dtypes",
    "typer",
    "rich",
    "sklearn",
    "thinc",
    "matplotlib",
    "fastadam.kernels.cpu",
]


def loaded(code):
    code = f"import sys; {code}; print([name for name in {HEAVY} if name in sys.modules])"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return ast.literal_eval(process.stdout)


def test_import_is_light():
    assert loaded("import fastadam") == []
    assert loaded("import fastadam; fastadam.FusedAdam(lr=0.1).state_dict()") == []
    assert loaded("import fastadam, numpy as np; fastadam.flatten([np.ones(3)])") == []
    assert loaded("import fastadam.exchange") == []


def test_the_light_import_check_bites():
    step = "import fastadam, numpy as np; fastadam.FusedAdam().step(np.ones(3), np.ones(3))"
    assert loaded(step) == ["numba", "llvmlite", "fastadam.kernels.cpu"]


def test_public_names():
    kinds = "Adadelta Adagrad Adam AdamW Adamax Lion NAdam RAdam RMSprop SGD"
    names = ["DynamicLossScale", *(f"Fused{kind}" for kind in kinds.split()), "Segment", "__version__"]
    names += ["flatten", "own_rule", "schedules", "warmup"]
    assert fastadam.__all__ == names
    assert all(hasattr(fastadam, name) for name in fastadam.__all__)
