"""The repository's Python files, and the names their imports bind."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# dsd_fast/kernels is a link to kernels/; its files are visited once, under their own folder.
TREES = ("dsd_fast", "kernels", "tests", "benchmarks")


def python_files(*trees: str) -> list[Path]:
    """Python files under the given folders of the repository, each once, in a fixed order."""
    files = (
        file
        for tree in trees
        for file in (ROOT / tree).rglob("*.py")
        if (ROOT / "dsd_fast/kernels") not in file.parents
    )
    return sorted(files)


def module_name(file: Path) -> str:
    """Import name of a file of the package: `kernels/common/backend.py` is `dsd_fast.kernels.common.backend`."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    parts = ("dsd_fast", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[ast.stmt, str, str | None, str]]:
    """Every import of a file, in functions too: (statement, module, attribute or None, the local name it binds).

    `import a.b` gives ("a.b", None, "a"); `from .a import b as c` in package p gives ("p.a", "b", "c").
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name, None, alias.asname or alias.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + is_package]
                source = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node, source, alias.name, alias.asname or alias.name
