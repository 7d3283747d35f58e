"""Who may import whom: the rooms of the package, held by reading the source."""

import ast
import statistics
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "diffax"

# The rooms of the package. A room imports itself and lower ones; rooms of one number do not know each other.
ROOMS = {
    "errors": 0,
    "components": 0.1,
    "diffusion": 1,
    "networks": 1,
    "data": 1,
    "conditions": 2,
    "models": 3,
    "config": 3.1,
    "training": 4,
    "weights": 5,
    "sampling": 6,
    "evaluation": 7,
    "tools": 8,
    "commands": 8.1,
    "main": 9,
    "__init__": 10,
}
NOWHERE = {"tensorflow", "torch", "jaxtyping", "clu", "dill", "cloudpickle"}
# Third-party packages and the rooms that alone may import them.
ONLY_IN = {
    "array_record": {"data"},
    "orbax": {"training"},
    "tensorflow_datasets": {"data"},
    "grain": {"data"},
    "sklearn": {"data", "evaluation"},
    "pickle": {"weights"},
    "safetensors": {"weights"},
    "huggingface_hub": {"weights"},
    "optax": {"training", "evaluation"},
    "ftfy": {"conditions"},
    "ml_collections": {"components", "config", "main"},
    "matplotlib": {"data"},
}
# Rooms that may import nothing else but the standard library and diffax.
NARROW = {
    "errors": set(),
    "components": {"ml_collections"},
    "config": {"ml_collections", "numpy"},
    "networks": {"jax", "flax", "chex", "numpy"},
    "diffusion": {"jax", "numpy"},
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
    if module not in ROOMS:
        return [f"{module} is missing from the table of rooms"]
    tree, found = ast.parse(source), []
    for name in sorted(imports(tree, package)):
        root, _, rest = name.partition(".")
        other = rest.split(".")[0]
        if root == "diffax":
            if other in ROOMS:
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
        if module != "training" and root == "jax" and name.split(".")[-1] in DEVICES:
            found.append(f"{module} names devices: {name}")
    for node in ast.walk(tree):
        if module != "training" and isinstance(node, ast.Attribute) and node.attr in DEVICES:
            value = node.value
            if (
                isinstance(value, ast.Name)
                and value.id in ("jax", "sharding")
                or (isinstance(value, ast.Attribute) and value.attr in ("sharding", "experimental"))
            ):
                found.append(f"{module} names devices: {node.attr}")
    return found


def may_import(module: str, other: str) -> bool:
    """Whether a file of one room may import another room."""
    return ROOMS[other] < ROOMS[module]


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_file_keeps_to_its_floor(path):
    package = ".".join(path.parent.relative_to(PACKAGE.parent).parts)
    assert violations(top(path), path.read_text(), package) == []


def test_there_are_files_to_check():
    assert {"diffusion", "networks", "config", "data"} <= {top(path) for path in FILES}


@pytest.mark.parametrize(
    "module, source",
    [
        ("diffusion", "from diffax.models.base import Start"),
        ("diffusion", "from diffax import models"),
        ("diffusion", "from .. import models"),
        ("diffusion", "def f():\n  import diffax.networks"),
        ("networks", "from diffax.diffusion.schedules import NoiseLevel"),
        ("networks", "import optax"),
        ("data", "from diffax import config"),
        ("training", "from diffax.sampling.load import load"),
        ("weights", "import torch"),
        ("data", "from tensorflow import io"),
        ("training", "import pickle"),
        ("models", "import jax\njax.devices()"),
        ("models", "import jax\nstep = jax.pmap(step)"),
        ("models", "from jax.sharding import Mesh"),
        ("models", "import jax\njax.sharding.Mesh"),
        ("config", "import jax"),
        ("newcomer", ""),
    ],
)
def test_bad_source_is_found(module, source):
    assert violations(module, source)


@pytest.mark.parametrize(
    "module, source",
    [
        ("diffusion", "from diffax.diffusion.process import posterior"),
        ("models", "from diffax import networks, diffusion"),
        ("training", "from diffax import models\nimport orbax.checkpoint"),
        ("training", "import jax\njax.devices()"),
        ("data", "devices = state.devices()"),
        ("__init__", "from diffax.models.base import Model\nfrom diffax.main import run"),
    ],
)
def test_good_source_is_let_through(module, source):
    assert violations(module, source) == []


def test_relative_imports_are_resolved():
    tree = ast.parse("from . import layers\nfrom .. import errors\nfrom .unet import UNet")
    names = {"diffax.networks.layers", "diffax.errors", "diffax.networks.unet.UNet"}
    assert imports(tree, "diffax.networks") == names


# ---- sizes ----------------------------------------------------------------------------------------------------------

MOST_LINES, MOST_OF_A_FUNCTION, MEDIAN_OF_FUNCTIONS = 500, 60, 10


def statements(node: ast.AST) -> int:
    """Lines of a function without its docstring."""
    body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
    return body[-1].end_lineno - body[0].lineno + 1


def functions() -> list[tuple[str, int]]:
    """(where, lines) of every function of the package; of one with others inside only the rest."""
    found = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                inner = sum(n.end_lineno - n.lineno + 1 for n in node.body if isinstance(n, ast.FunctionDef))
                found.append((f"{path.relative_to(PACKAGE)}:{node.name}", statements(node) - inner))
    return found


def test_no_file_is_long():
    """Without a reason, which stands in its docstring after 'One long file:'."""
    texts = {str(path.relative_to(PACKAGE)): path.read_text() for path in FILES}
    long = {name: n for name, text in texts.items() if (n := len(text.splitlines())) > MOST_LINES}
    without = {
        name: n
        for name, n in long.items()
        if "One long file: " not in (ast.get_docstring(ast.parse(texts[name])) or "")
    }
    assert not without, f"more than {MOST_LINES} lines: {without}"


def test_functions_are_short():
    found = functions()
    long = [(where, lines) for where, lines in found if lines > MOST_OF_A_FUNCTION]
    assert not long, f"more than {MOST_OF_A_FUNCTION} lines: {long}"
    assert statistics.median(lines for _, lines in found) <= MEDIAN_OF_FUNCTIONS


MODELS = ("DiffusionModel", "NoisedClassifier", "CodePrior", "Clip", "BestOf", "Stage")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nobody_tells_kinds_of_models_apart(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
            named = ast.unparse(node.args[1])
            assert not any(name in named for name in MODELS), f"line {node.lineno}: isinstance of {named}"
