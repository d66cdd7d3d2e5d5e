"""The project's Python files, parsed once, for tests that read code."""

import ast
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Module:
    path: Path  # relative to the repository
    text: str
    tree: ast.Module

    @cached_property
    def nodes(self) -> list[ast.AST]:
        """Of the whole tree: each rule reads them, and to walk a tree takes longer than that."""
        return list(ast.walk(self.tree))

    def __str__(self) -> str:
        return str(self.path)


@cache
def modules(*folders: str) -> tuple[Module, ...]:
    files = sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))
    return tuple(parse(file.relative_to(ROOT), file.read_text(encoding="utf-8")) for file in files)


def parse(path: Path, text: str) -> Module:
    return Module(path, text, ast.parse(text, filename=str(path)))


def imported(module: Module) -> list[tuple[int, str]]:
    """Line and top-level name of every absolute import, also those inside functions."""
    found: list[tuple[int, str]] = []
    for node in module.nodes:
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name.split(".")[0]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.append((node.lineno, (node.module or "").split(".")[0]))
    return found
