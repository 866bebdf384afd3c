"""How large the library is, and how its modules hang together: `python -m benchmarks.house --before d827a38`.

Counted is `ckptmgr` without `cli` and `interop`. A room is a package, or a module that lies beside the rooms.
"""

from __future__ import annotations

import argparse
import ast
import sys
import tempfile
import tokenize
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks import before

LEFT_OUT = {"cli", "interop"}
Tree = Mapping[str, tuple[Path, ast.Module]]


def measure(root: Path) -> dict[str, Any]:
    paths = [path.relative_to(root) for path in sorted((root / "ckptmgr").rglob("*.py"))]
    names = {path: ".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in paths}
    tree = {names[path]: (root / path, ast.parse((root / path).read_text()))
            for path in paths if path.parts[1] not in LEFT_OUT}  # fmt: skip
    code, words = map(sum, zip(*(_lines(*entry) for entry in tree.values()), strict=True))
    imported = {name: set(_imports(parsed)) for name, (_, parsed) in tree.items()}
    arrows = {(name, _module_of(tree, other)) for name, others in imported.items() for other in others}
    arrows = {(name, other) for name, other in arrows if other not in (name, "")}
    rooms = {(a.split(".")[:2][-1], b.split(".")[:2][-1]) for a, b in arrows}
    orbax = [name for name, others in imported.items() if any(each.split(".")[0] == "orbax" for each in others)]
    return {
        "lines of code": code, "lines of docstrings and comments": words, "modules": len(tree),
        "arrows between modules": len(arrows),
        "arrows between rooms": sum(a != b for a, b in rooms),
        "circles": _circles(arrows), "modules that import Orbax": orbax,
        "private names of others": _private(tree, root),
    }  # fmt: skip


def _lines(path: Path, parsed: ast.Module) -> tuple[int, int]:
    """Lines of code, and lines that are nothing but docstring or comment; blank ones are neither."""
    with open(path, "rb") as file:
        tokens = [each for each in tokenize.tokenize(file.readline) if each.string.strip()][1:]
    docs = [node for node in ast.walk(parsed) if isinstance(node, ast.Expr) and _text(node.value)]
    words = {line for each in docs for line in range(each.lineno, (each.end_lineno or each.lineno) + 1)}
    comments = {each.start[0] for each in tokens if each.type == tokenize.COMMENT}
    code = {line for each in tokens if each.type != tokenize.COMMENT
            for line in range(each.start[0], each.end[0] + 1)} - words  # fmt: skip
    return len(code), len((words | comments) - code)


def _text(node: ast.AST) -> str:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def _imports(parsed: ast.Module) -> Iterator[str]:
    """Every name that is imported, inside of functions and under TYPE_CHECKING, too."""
    for node in ast.walk(parsed):
        if isinstance(node, ast.Import | ast.ImportFrom):
            start = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            yield from (start + each.name for each in node.names)


def _module_of(tree: Tree, name: str) -> str:
    return name if name in tree or not name else _module_of(tree, name.rpartition(".")[0])


def _circles(arrows: set[tuple[str, str]]) -> list[str]:
    """Modules that reach each other, a line for each such group."""
    reached = {name: {other for each, other in arrows if each == name} for name, _ in arrows}
    for middle in reached:
        for others in reached.values():
            others |= reached[middle] if middle in others else set()
    groups = {frozenset(other for other in reached[name] if name in reached.get(other, ())) for name in reached}
    return sorted(", ".join(sorted(group)) for group in groups if group)


def _private(tree: Tree, root: Path) -> list[str]:
    """Names with an underscore that the package uses and nowhere makes, each with its file and line."""
    made, used = {"_replace", "_asdict", "_fields", "_make"}, set()  # these are public, in every NamedTuple
    for path, parsed in tree.values():
        for node in ast.walk(parsed):
            is_stored = isinstance(getattr(node, "ctx", None), ast.Store)
            names: list[str] = []
            if isinstance(node, ast.Import | ast.ImportFrom):
                found = [each.split(".") for each in _imports(ast.Module([node], []))]
                names = [part for parts in found if parts[0] != "ckptmgr" for part in parts]
            elif isinstance(node, ast.Call) and getattr(node.func, "id", None) in ("getattr", "setattr"):
                names = [_text(node.args[1])]
            elif isinstance(node, ast.Attribute) and not (is_stored and getattr(node.value, "id", "") == "self"):
                names = [node.attr]
            elif is_stored or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                made |= {getattr(node, key, "") for key in ("id", "attr", "name")}
            private = [name for name in names if name[:1] == "_" and name[:2] != "__"]
            used |= {(str(path.relative_to(root)), node.lineno, name) for name in private}
    return [f"{path}:{line} {name}" for path, line, name in sorted(used) if name not in made]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.house", description=__doc__)
    parser.add_argument("--before", metavar="COMMIT", default=before.COMMIT, help="default: %(default)s")
    commit = parser.parse_args().before
    with tempfile.TemporaryDirectory() as directory:
        try:
            old, new = measure(before.checkout(commit, Path(directory))), measure(before.ROOT)
        except before.UnavailableError as problem:
            sys.exit(f"{commit} cannot be looked at: {problem}")
    for name in new:
        lists = [(commit, old[name]), ("now", new[name])] if isinstance(new[name], list) else []
        print(f"{name}: {len(old[name])} -> {len(new[name])}" if lists else f"{name}: {old[name]} -> {new[name]}")
        print("".join(f"  {when}: {line}\n" for when, found in lists for line in found), end="")


if __name__ == "__main__":
    main()
