"""Finds code that could run what a file or a string says: pickles, eval, shells, remote code."""

import ast

from tests.repository.source import imports

BANNED_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve"}

BANNED_NAMES = {
    "joblib.load": "loads pickles",
    "pandas.read_pickle": "loads pickles",
    "builtins.eval": "evaluates text",
    "builtins.exec": "executes text",
    "os.system": "runs a shell",
    "os.popen": "runs a shell",
    "subprocess.getoutput": "runs a shell",
    "subprocess.getstatusoutput": "runs a shell",
}

# Keyword: the one value it may have.
BANNED_KEYWORDS = {"shell": False, "trust_remote_code": False, "allow_pickle": False, "weights_only": True}

TORCH_LOADS = {"torch.load", "torch.serialization.load"}


def violations(source: str) -> list[str]:
    """What a Python source breaks, as "line N: …", in the order of the lines."""
    tree = ast.parse(source)
    found: list[tuple[int, str]] = []
    aliases = _aliases(tree)
    for node, module, _, _ in imports(tree, "", False):
        if module.split(".")[0] in BANNED_MODULES:
            found.append((node.lineno, f"import of {module}"))

    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            name = _dotted(node, aliases)
            if name in BANNED_NAMES:
                found.append((node.lineno, f"{name} {BANNED_NAMES[name]}"))
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                if name in BANNED_NAMES:
                    found.append((node.lineno, f"{name} {BANNED_NAMES[name]}"))
        elif isinstance(node, ast.Call):
            given = {keyword.arg for keyword in node.keywords}
            if _dotted(node.func, aliases) in TORCH_LOADS and "weights_only" not in given:
                found.append((node.lineno, "torch.load without weights_only=True"))
            for keyword in node.keywords:
                found += _keyword(keyword.arg, keyword.value)
        elif isinstance(node, ast.Dict):
            # Options passed on with ** have the same names.
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(key.value, str):
                    found += _keyword(key.value, value)
    return [f"line {line}: {text}" for line, text in sorted(set(found))]


def torch_loads(source: str) -> int:
    """How often a Python source calls torch.load."""
    tree = ast.parse(source)
    aliases = _aliases(tree)
    return sum(isinstance(node, ast.Call) and _dotted(node.func, aliases) in TORCH_LOADS for node in ast.walk(tree))


def _aliases(tree: ast.AST) -> dict[str, str]:
    """Local name to full name."""
    aliases: dict[str, str] = {"eval": "builtins.eval", "exec": "builtins.exec"}
    for _, module, attribute, local in imports(tree, "", False):
        if attribute is not None:
            aliases[local] = f"{module}.{attribute}"
        else:
            aliases[local] = module if local != module.split(".")[0] else local
    return aliases


def _keyword(name: str | None, value: ast.expr) -> list[tuple[int, str]]:
    if name not in BANNED_KEYWORDS:
        return []
    allowed = BANNED_KEYWORDS[name]
    if isinstance(value, ast.Constant) and value.value is allowed:
        return []
    return [(value.lineno, f"{name} is not {allowed}")]


def _dotted(node: ast.expr, aliases: dict[str, str]) -> str | None:
    """Full name of `a.b.c` with the imports' renamings undone; None for anything else."""
    if isinstance(node, ast.Name):
        return aliases.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        owner = _dotted(node.value, aliases)
        return None if owner is None else f"{owner}.{node.attr}"
    return None
