"""Which module imports which, and whether that goes round in a circle."""

import ast
import graphlib
from collections.abc import Collection, Mapping

from tests.repository.source import imports


def arrows(sources: Mapping[str, str], packages: Collection[str]) -> dict[str, set[str]]:
    """Module → the modules it imports, in functions and for type checkers too.

    A package's `__init__` only hands names on. It is none of the modules, and importing a name from it is an arrow to
    the module that it has the name from; where that cannot be told there is no arrow.

    Args:
        sources: Python text of each module, `__init__` files under the name of their package.
        packages: which of the names are packages.
    """
    trees = {name: ast.parse(source) for name, source in sources.items()}
    handed_on = {
        f"{package}.{local}": (source, attribute)
        for package in packages
        for _, source, attribute, local in imports(trees[package], package, True)
    }

    def target(source: str, attribute: str | None) -> str | None:
        whole = source if attribute is None else f"{source}.{attribute}"
        # A package may import its own modules as names.
        if handed_on.get(whole, (source, attribute)) != (source, attribute):
            return target(*handed_on[whole])
        return next((name for name in (whole, source) if name in sources and name not in packages), None)

    return {
        module: {target(source, attribute) for _, source, attribute, _ in imports(tree, module, False)} - {None, module}
        for module, tree in trees.items()
        if module not in packages
    }


def circle(graph: Mapping[str, Collection[str]]) -> list[str]:
    """Modules that import each other in turn, the first of them again at the end; empty if there are none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        # graphlib's arrows go from what comes first to what needs it.
        return list(reversed(error.args[1]))
    return []
