"""Which source a trial's numbers depend on, found without importing anything.

Starting from the module that holds `run`, imports are followed through the sources of its own paper and of `common` by
reading their syntax trees. The hash covers code, not comments, docstrings or layout, so that explaining a method better
retrains nothing and changing it retrains whatever used it. Modules that only carry results around are left out.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

INFRASTRUCTURE = frozenset(
    f"common.{name}"
    for name in (
        "trials",
        "provenance",
        "ranks",
        "rows",
        "compose",
        "fingerprint",
        "config",
        "errors",
        "manual",
        "cli",
        "sweeps",
        "launch",
        "planned",
        "plancache",
        "task",
        "records",
        "reproduce",
        "tracking",
        "claims",
        "statistics",
        "report",
        "figures",
        "pairing",
    )
)
"""Modules that cannot change a trial's numbers."""
NATIVE_SUFFIXES = (".c", ".cpp", ".cu", ".h", ".hpp", ".cuh")


@functools.cache
def fingerprint(entry_module: str) -> str:
    """Hash the sources that a trial of `entry_module` depends on.

    Args:
        entry_module: dotted name of the module with `run(config, trial)`.

    Returns:
        16 hex digits.

    Raises:
        ModuleNotFoundError: when the module has no source file.
    """
    digest = hashlib.sha256()
    for name, path in sorted(sources(entry_module).items()):
        digest.update(name.encode() + b"\0" + _content(path) + b"\0")
    return digest.hexdigest()[:16]


def sources(entry_module: str) -> dict[str, Path]:
    """Map each module (and native source) that a trial of `entry_module` depends on to its file.

    Raises:
        ModuleNotFoundError: when the module has no source file.
    """
    start = find_source(entry_module)
    if start is None:
        raise ModuleNotFoundError(f"entry_module={entry_module}: no such module", name=entry_module)
    house = {entry_module.split(".")[0], "common"}
    found: dict[str, Path] = {}
    todo = [entry_module]
    while todo:
        name = todo.pop()
        path = find_source(name)
        if name in found or name in INFRASTRUCTURE or name.split(".")[0] not in house or path is None:
            continue
        found[name] = path
        todo.extend(_imports(path, name))
    native = {
        f"{path.parent.name}/{file.name}": file
        for path in found.values()
        if path.parent.name == "kernels"
        for file in path.parent.iterdir()
        if file.suffix in NATIVE_SUFFIXES
    }
    return found | native


@functools.cache
def find_source(module: str) -> Path | None:
    """Return the source file of a dotted module name without importing it or its parents, or None."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    roots = [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
    if not rest and spec and spec.origin:
        return Path(spec.origin)
    for root in roots:
        base = root.joinpath(*rest)
        for candidate in (base / "__init__.py", base.with_name(base.name + ".py")):
            if candidate.is_file():
                return candidate
    return None


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_bytes(), filename=str(path))


@functools.cache
def _content(path: Path) -> bytes:
    """Return the part of a file that can change a number."""
    if path.suffix != ".py":
        return path.read_bytes()
    tree = ast.parse(path.read_bytes())  # a fresh tree: docstrings are cut out of it
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            kept = [s for s in body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
            node.body = kept or [ast.Pass()]  # type: ignore[attr-defined]
    return ast.dump(tree).encode()


def _imports(path: Path, module: str) -> Iterator[str]:
    """Yield the modules that a source file imports; a package's re-exports are followed to their definition."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in _walk(_tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, package)
            for alias in node.names:
                yield from _resolve(base, alias.name)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            yield from (a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """Walk a tree without the branches that only type checkers read."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            child = ast.Module(body=child.orelse, type_ignores=[])
        yield child
        yield from _walk(child)


def _absolute(node: ast.ImportFrom, package: str) -> str:
    """Return the absolute name of the module in `from <module> import ...`."""
    if not node.level:
        return node.module or ""
    parts = package.split(".")
    parents = parts[: len(parts) - node.level + 1]
    return ".".join(parents + ([node.module] if node.module else []))


def _resolve(base: str, name: str, seen: frozenset[tuple[str, str]] = frozenset()) -> Iterator[str]:
    """Yield the modules behind `from base import name`."""
    submodule = f"{base}.{name}"
    path = find_source(base) if base else None
    if name != "*" and find_source(submodule) is not None:
        yield submodule
    elif path is None:
        return
    elif path.name != "__init__.py" or name == "*" or (base, name) in seen:
        yield base
    else:
        yield from _exported(base, path, name, seen | {(base, name)})


def _exported(package: str, path: Path, name: str, seen: frozenset[tuple[str, str]]) -> Iterator[str]:
    """Follow a name of a package to the module that defines it; the `__init__` itself only when it defines it."""
    tree = _tree(path)
    for node in _walk(tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    yield from _resolve(_absolute(node, package), alias.name, seen)
                    return
    lazy = _lazy_export(tree, package, name)
    yield lazy if lazy else package


def _lazy_export(tree: ast.Module, package: str, name: str) -> str | None:
    """Read the table of a lazy package, `{"Name": "submodule"}` or `{"submodule": ["Name", ...]}`."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Dict):
            continue
        for key, value in zip(node.keys, node.values, strict=True):
            left = [c.value for c in ast.walk(key) if isinstance(c, ast.Constant)] if key else []
            right = [c.value for c in ast.walk(value) if isinstance(c, ast.Constant)]
            here, there = (left, right) if name in left else (right, left)
            for target in there if name in here else []:
                for candidate in (f"{package}.{str(target).lstrip('.')}", str(target)):
                    if find_source(candidate) is not None:
                        return candidate
    return None
