"""The package's floors: which room may import which."""

import ast
import sys

from tests.repository.source import imports

# Ground floor first. A room may import rooms of lower floors, and nothing beside or above it.
FLOORS = (
    ("kernels",),
    ("models", "diffusion", "images", "jobs"),
    ("metrics", "unet"),
    ("engine",),
    ("training",),
    ("matching", "features", "class_tokens", "image_prompt", "generation", "retrieval"),
    ("bench",),
    ("cli", "compat"),
)
SIDEWAYS = {
    ("models", "diffusion"),  # a bundle carries its noise schedule
    ("models", "images"),  # a ControlNet looks at a picture
    ("models", "jobs"),  # checkpoints and adapters are files that appear whole or not at all
    ("class_tokens", "generation"),
    ("image_prompt", "generation"),
    ("retrieval", "matching"),
}

# The judge of the rest: it shares no code with it, and only what compares may run it.
JUDGE = "reference"
JUDGE_IMPORTS = {"torch", "diffusers", "transformers", "numpy", *sys.stdlib_module_names}
JUDGE_USERS = {"bench", "cli"}

LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
TOP = {"cli", "compat"}


def violations(source: str, module: str, homes: dict[str, str], is_package: bool = False) -> list[str]:
    """Imports of a file of the package that its place forbids, as "line N: …".

    `homes` maps the lazy names of `dsd_fast` to the modules they live in, so that importing one is an arrow there.
    """
    room = _room(module)
    if room is None:
        return []
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    deferred = {id(node) for function in functions for node in ast.walk(function)}
    found = []
    for node, name, attribute, _ in imports(tree, module, is_package):
        for reason in _reasons(room, module, _target(name, attribute, homes), id(node) in deferred):
            found.append(f"line {node.lineno}: {reason}")
    return found


def _reasons(room: str, module: str, target: str, deferred: bool) -> list[str]:
    top = target.split(".")[0]
    if top != "dsd_fast":
        if room == JUDGE and top not in JUDGE_IMPORTS:
            return [f"{room} imports {top}"]
        if top == "triton":
            return _triton(room, module.split(".")[-1], deferred)
        return []
    if target == "dsd_fast.__version__":
        return []
    to = _room(target)
    if to is None:
        return [] if room in TOP else [f"{room} imports the whole package, which hides the arrow"]
    if to == room or (room, to) in SIDEWAYS:
        return []
    if to == JUDGE:
        return [] if room in JUDGE_USERS else [f"{room} imports {to}"]
    if room == JUDGE:
        return [f"{room} imports {to}"]
    if to not in LEVEL or room not in LEVEL:
        return [f"{to if to not in LEVEL else room} has no floor"]
    return [] if LEVEL[to] < LEVEL[room] else [f"{room} imports {to}, which is not below it"]


def _triton(room: str, file: str, deferred: bool) -> list[str]:
    """Kernels import Triton; their callers do so when they launch; the oracle beside them never does."""
    if room == "kernels" and (file == "kernel" or file.endswith("_kernel") or (deferred and file != "reference")):
        return []
    return [f"{file} imports triton"]


def _target(name: str, attribute: str | None, homes: dict[str, str]) -> str:
    if name == "dsd_fast" and attribute is not None:
        return homes.get(attribute, f"dsd_fast.{attribute}")
    return name


def _room(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None
