"""Requirements are declared where imported, and constraints pin what `make` installs: constraints.txt no more and no
less, constraints-oldest.txt the lowest that is declared."""

import ast
import re
import sys
import tomllib
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.repository.source import ROOT, imports, module_name, python_files


def pinned(name: str) -> dict[str, str]:
    """Distribution → version, in a file where they are sorted."""
    lines = [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)
    assert list(pins) == sorted(pins)
    return pins


def test_constraints_pin_everything_that_make_installs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = pinned("constraints.txt")
    assert pins["torch"] == "2.13.0"
    assert pins["triton"] == "3.7.1"

    extras = project["optional-dependencies"]
    pending = [Requirement(text) for text in [*project["dependencies"], *extras["dev"]]]
    closure, seen = set(), set()
    while pending:
        requirement = pending.pop()
        name = canonicalize_name(requirement.name)
        if (name, frozenset(requirement.extras)) in seen:
            continue
        seen.add((name, frozenset(requirement.extras)))
        if name == "dsd-fast":
            pending += [Requirement(text) for extra in requirement.extras for text in extras[extra]]
            continue
        closure.add(name)
        assert requirement.specifier.contains(pins.get(name, "0")), f"{requirement} is not met by constraints.txt"
        if name == "torch":
            # Its requirements depend on the build; a CUDA build pins NVIDIA's packages itself.
            pending += [
                Requirement(text.split(";")[0]) for text in ("filelock", "fsspec", "jinja2", "networkx", "sympy")
            ]
            continue
        for text in metadata.distribution(name).requires or []:
            needed = Requirement(text)
            environments = [{"extra": extra} for extra in ("", *requirement.extras)]
            if needed.marker is None or any(needed.marker.evaluate(environment) for environment in environments):
                pending.append(needed)
    assert closure == set(pins)


def test_the_oldest_constraints_are_the_floors_that_are_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins, extras = pinned("constraints-oldest.txt"), project["optional-dependencies"]
    assert pins["torch"] == "2.11.0"
    assert pins["triton"] == "3.6.0"
    wanted = re.search(r'WANTED := -e "\.\[triton\]" (.*)', (ROOT / "Makefile").read_text())[1].split()
    tools = [Requirement(text) for extra in ("dev", "bench") for text in extras[extra]]
    tools = [tool for tool in tools if tool.name in (*wanted, "setuptools", "wheel")]
    assert {tool.name for tool in tools} == {*wanted, "setuptools", "wheel"}
    for requirement in [*(Requirement(text) for text in [*project["dependencies"], *extras["triton"]]), *tools]:
        floor = next(Version(each.version) for each in requirement.specifier if each.operator == ">=")
        pin = Version(pins[canonicalize_name(requirement.name)])
        # The floor itself, or where that was never released the first of its kind.
        assert (pin.major, pin.minor) == (floor.major, floor.minor), f"{requirement} is pinned to {pin}"
        assert requirement.specifier.contains(pin)
    # A build of torch for CUDA pins those itself.
    assert not [name for name in pins if name.startswith(("nvidia", "cuda"))]


# Imports that an extra brings: import name to the extra.
OPTIONAL = {
    "triton": "triton",
    "cv2": "control",
    "matplotlib": "bench",
    "ray": "ray",
    "scipy": "bench",
    "sklearn": "bench",
    "timm": "zsl",
    "torchmetrics": "metrics",
}
DISTRIBUTIONS = {
    "PIL": "pillow",
    "cv2": "opencv-python-headless",
    "sklearn": "scikit-learn",
    "huggingface_hub": "huggingface-hub",
}


def test_every_imported_package_is_required():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = {canonicalize_name(Requirement(text).name) for text in project["dependencies"]}
    imported = set()
    for file in python_files("dsd_fast", "kernels"):
        for _, module, _, _ in imports(ast.parse(file.read_text()), module_name(file), file.name == "__init__.py"):
            imported.add(module.split(".")[0])
    imported -= {"dsd_fast", *sys.stdlib_module_names}
    assert "torch" in imported
    for name in imported - OPTIONAL.keys():
        assert DISTRIBUTIONS.get(name, name) in required, f"{name} is imported but not required"
    for name, extra in OPTIONAL.items():
        extras = {canonicalize_name(Requirement(text).name) for text in project["optional-dependencies"][extra]}
        assert DISTRIBUTIONS.get(name, name) in extras
