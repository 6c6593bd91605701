"""No module imports itself by way of others, in functions and for type checkers neither."""

from tests.repository.circles import arrows, circle
from tests.repository.source import module_name, python_files

SOURCES = {
    "p": "from p.a import A\nfrom p.q import B, late",
    "p.a": "import os\nfrom .c import C\n\ndef f():\n    from p import B",
    "p.c": "from p.q import *\nfrom p import q, later",
    "p.q": "from p.q import late\nfrom .b import B as lazy\nfrom p.q.b import B",
    "p.q.b": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..a import A",
    "p.q.late": "from p.q import lazy, unknown\nimport p.c",
    "p.later": "import p.q.b.unknown",
}
GRAPH = {"p.a": {"p.c", "p.q.b"}, "p.c": {"p.later"}, "p.later": set(), "p.q.b": {"p.a"}, "p.q.late": {"p.c", "p.q.b"}}


def test_arrows_of_a_made_up_package():
    assert arrows(SOURCES, {"p", "p.q"}) == GRAPH


def test_a_circle_is_found_and_goes_the_way_of_the_imports():
    assert circle(GRAPH) in (["p.a", "p.q.b", "p.a"], ["p.q.b", "p.a", "p.q.b"])
    assert circle(GRAPH | {"p.q.b": set()}) == []
    three = {"x": {"y", "w"}, "y": {"z"}, "z": {"x", "w"}, "w": ()}
    assert "".join(circle(three)) in ("xyzx", "yzxy", "zxyz")


def test_no_module_imports_itself_by_way_of_others():
    files = {module_name(file): file for file in python_files("dsd_fast", "kernels", "benchmarks")}
    packages = {name for name, file in files.items() if file.name == "__init__.py"}
    graph = arrows({name: file.read_text() for name, file in files.items()}, packages)
    # Through `dsd_fast.matching`, and in a function.
    assert "dsd_fast.matching.matcher" in graph["dsd_fast.bench.suites.match"]
    assert "dsd_fast.bench.case" in graph["dsd_fast.cli.bench"]
    assert circle(graph) == []
