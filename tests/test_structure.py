# SPDX-License-Identifier: Apache-2.0
"""Includes and imports go one way: a file uses only what lies below it."""

import ast
import graphlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BELOW = {  # the rooms of csrc that a room may include, beside itself and combiner.h
    "runtime": set(),
    "kernels": {"runtime"},
    "plan": {"runtime"},
    "tile": {"runtime", "kernels", "plan"},
    "engine": {"runtime", "kernels", "plan", "tile"},
    "decode": {"runtime", "kernels", "plan", "tile"},
    "cluster": {"runtime", "kernels"},
    "select": {"runtime", "kernels", "plan"},
}


@pytest.mark.parametrize("room", [path.name for path in (ROOT / "csrc").iterdir() if path.is_dir()])
def test_rooms_include_what_lies_below(room):
    for path in (ROOT / "csrc" / room).iterdir():
        for included in re.findall(r'^#include "(\w+)/', path.read_text(), re.MULTILINE):
            assert included in BELOW[room] | {room}, f"{path} includes {included}"


def test_no_header_includes_itself():
    files = {str(path.relative_to(ROOT / "csrc")): path for path in (ROOT / "csrc").rglob("*.[ch]")}
    graphlib.TopologicalSorter(
        {name: re.findall(r'^#include "([^"]+)"', path.read_text(), re.MULTILINE) for name, path in files.items()}
    ).prepare()  # a CycleError names a circle


def imports(name: str, path: Path, modules: set[str]) -> set[str]:
    """The modules of the package that one imports from within the package, when it is run."""
    found = set()
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    nodes = [ast.parse(path.read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            nodes += node.orelse
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.ImportFrom) and node.level:
            base = ".".join([*package[: len(package) + 1 - node.level], *filter(None, [node.module])])
            for each in node.names:
                full = f"{base}.{each.name}"
                found.add(full if full in modules else base)
    return found - {name}


def test_no_module_imports_itself():
    modules = {}
    for path in (ROOT / "combiner").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    order = graphlib.TopologicalSorter(
        {name: imports(name, path, {*modules, "combiner._core"}) for name, path in modules.items()}
    )
    order.prepare()
