"""Who may import whom: the layers of the package, held by reading the source."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "diffax"

# A module imports lower floors only. Decimals order the modules of one floor.
FLOORS = {
    "schedules": 0,
    "models": 0,
    "process": 1,
    "guidance": 2.0,
    "timesteps": 2.0,
    "conditioning": 2.0,
    "codes": 2.0,
    "samplers": 2.1,
    "losses": 2.2,
    "stages": 3.0,
    "convert": 3.1,
    "train": 4.0,
    "pipeline": 4.0,
    "ahead": 4.1,
    "judges": 4.1,
    "compare": 4.1,
    "evaluate": 4.2,
    "editing": 4.1,
    "main": 5,
    "benchmark": 5.1,
    "__init__": 6,
}
# Each alone with its outside world: what it may import of diffax; floors from 3 up may import it.
LEAVES = {
    "errors": set(),
    "config": {"errors", "schedules", "tokenizer"},  # to check steps, betas and ids before anything is built
    "checkpoint": {"errors"},
    "images": {"errors"},
    "reporting": {"errors"},
    "parallel": {"errors"},
    "data": {"errors"},
    "tokenizer": {"errors"},
    "metrics": set(),
}
NOWHERE = {"tensorflow", "torch", "jaxtyping", "clu", "dill", "cloudpickle"}
# Third-party packages and the modules that alone may import them.
ONLY_IN = {
    "array_record": {"data"},
    "orbax": {"checkpoint"},
    "tensorflow_datasets": {"data"},
    "grain": {"data"},
    "sklearn": {"data", "judges"},
    "pickle": {"convert"},
    "safetensors": {"convert"},
    "huggingface_hub": {"convert"},
    "optax": {"train"},
    "ftfy": {"tokenizer"},
    "ml_collections": {"config", "main"},
    "matplotlib": {"images"},
}
# Modules that may import nothing else but the standard library and diffax.
NARROW = {
    "errors": set(),
    "tokenizer": {"numpy", "ftfy"},
    "config": {"ml_collections", "numpy"},
    "models": {"jax", "flax", "chex", "numpy"},
    "schedules": {"jax", "flax", "chex", "numpy"},
}
DEVICES = {
    "devices", "local_devices", "device_count", "local_device_count", "pmap", "shard_map", "Mesh",
    "make_mesh", "NamedSharding", "PositionalSharding",
}  # fmt: skip


def top(path: Path) -> str:
    """The row of the table to which a file belongs: its module, or the folder that holds it."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST, package: str) -> set[str]:
    """Full names of everything imported; `from diffax import x` gives diffax.x."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) + 1 - node.level], *filter(None, [base])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def violations(module: str, source: str, package: str = "diffax") -> list[str]:
    """What a file of row `module` does that the tables forbid."""
    if module not in FLOORS and module not in LEAVES:
        return [f"{module} is missing from the table of floors"]
    tree, found = ast.parse(source), []
    for name in sorted(imports(tree, package)):
        root, _, rest = name.partition(".")
        other = rest.split(".")[0]
        if root == "diffax":
            if other in FLOORS or other in LEAVES:
                if other != module and not may_import(module, other):
                    found.append(f"{module} imports {name}")
            elif module not in ("__init__", "main"):
                found.append(f"{module} imports the package itself: {name}")
        elif root in NOWHERE:
            found.append(f"{module} imports {root}")
        elif module not in ONLY_IN.get(root, {module}):
            found.append(f"{module} imports {root}")
        elif root not in sys.stdlib_module_names and root not in NARROW.get(module, {root}):
            found.append(f"{module} imports {root}")
        if module != "parallel" and root == "jax" and name.split(".")[-1] in DEVICES:
            found.append(f"{module} names devices: {name}")
    for node in ast.walk(tree):
        if module != "parallel" and isinstance(node, ast.Attribute) and node.attr in DEVICES:
            value = node.value
            if (
                isinstance(value, ast.Name)
                and value.id in ("jax", "sharding")
                or (isinstance(value, ast.Attribute) and value.attr in ("sharding", "experimental"))
            ):
                found.append(f"{module} names devices: {node.attr}")
    return found


def may_import(module: str, other: str) -> bool:
    if module in LEAVES:
        return other in LEAVES[module]
    if other == "errors":
        return module not in ("models", "schedules")
    if other in LEAVES:
        return FLOORS[module] >= 3
    return FLOORS[other] < FLOORS[module]


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_file_keeps_to_its_floor(path):
    package = ".".join(path.parent.relative_to(PACKAGE.parent).parts)
    assert violations(top(path), path.read_text(), package) == []


def test_there_are_files_to_check():
    assert {"schedules", "models", "config", "data"} <= {top(path) for path in FILES}


@pytest.mark.parametrize(
    "module, source",
    [
        ("process", "from diffax.samplers import ddpm"),
        ("process", "from diffax import samplers"),
        ("process", "from . import samplers"),
        ("process", "def f():\n  import diffax.stages"),
        ("guidance", "from diffax.losses import vlb"),
        ("losses", "from diffax import config"),
        ("data", "from diffax import config"),
        ("checkpoint", "from diffax.train import State"),
        ("train", "from diffax.main import run"),
        ("models", "from diffax.errors import UserError"),
        ("models", "import optax"),
        ("models", "from diffax.schedules import NoiseLevel"),
        ("train", "import orbax.checkpoint as ocp"),
        ("convert", "import torch"),
        ("data", "from tensorflow import io"),
        ("train", "import pickle"),
        ("train", "import jax\njax.devices()"),
        ("train", "import jax\nstep = jax.pmap(step)"),
        ("train", "from jax.sharding import Mesh"),
        ("stages", "import jax\njax.sharding.Mesh"),
        ("config", "import jax"),
        ("newcomer", ""),
    ],
)
def test_bad_source_is_found(module, source):
    assert violations(module, source)


@pytest.mark.parametrize(
    "module, source",
    [
        ("losses", "from diffax.process import posterior"),
        ("stages", "from diffax import models, samplers"),
        ("train", "from diffax import checkpoint, parallel, stages"),
        ("checkpoint", "import orbax.checkpoint\nfrom diffax.errors import RunError"),
        ("parallel", "import jax\njax.devices()"),
        ("images", "devices = state.devices()"),
        ("__init__", "from diffax.stages import Stage\nfrom diffax.main import run"),
    ],
)
def test_good_source_is_let_through(module, source):
    assert violations(module, source) == []


def test_relative_imports_are_resolved():
    tree = ast.parse("from . import layers\nfrom .. import errors\nfrom .unet import UNet")
    names = {"diffax.models.layers", "diffax.errors", "diffax.models.unet.UNet"}
    assert imports(tree, "diffax.models") == names
