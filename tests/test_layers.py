"""The layers of dse/, read from the sources: imports point down, none is in a circle, and nothing grows too long."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import pytest
from processes import LONG, ROOT

ORDER = (("system",), ("data",), ("networks",), ("storage",), ("training",), ("models", "index"), ("experiments",),
         ("commands",), ("__main__",))  # fmt: skip
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
LIBRARY = {name for name, level in LEVEL.items() if level <= LEVEL["experiments"]}
LIGHT = ("dse.networks.config", "dse.networks.poolers", "dse.networks.pretrained", "dse.training.reporting", "dse.cli")
HEAVY = ("torch", "transformers")
MOST_LINES = {"function": 50, "class": 150, "module": 400}


class Import(NamedTuple):
    """An import: of which module, in which line, within a function, and for type checkers alone."""

    module: str
    line: int
    within: bool
    typing: bool


def name_of(path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PATHS = {name_of(path): path for path in (*sorted(ROOT.glob("dse/**/*.py")), *sorted(ROOT.glob("*.py")))}
SCRIPTS = {name for name in PATHS if name != "dse" and not name.startswith("dse.")}


def layer_of(module: str) -> str:
    """The folder or root module of a module of dse; a script is a layer of its own name."""
    return module.split(".")[1] if "." in module else module


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(PATHS[module].read_text())


@cache
def imports_of(module: str) -> list[Import]:
    """All imports of a module, `from package import module` as one of that module."""

    def found(node: ast.AST, within: bool, typing: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, within, typing)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno} is a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield Import(whole if whole in PATHS else str(node.module), node.lineno, within, typing)
        within |= isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing |= isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.iter_child_nodes(node):
            yield from found(child, within, typing)

    return list(found(tree_of(module), False, False))


def at_import(module: str) -> set[str]:
    """The project's modules that importing a module imports itself, the packages around each included."""
    named = [each.module for each in imports_of(module) if not each.within | each.typing]
    around = [".".join(name.split(".")[:end]) for name in (module, *named) for end in range(1, name.count(".") + 1)]
    return {name for name in (*named, *around) if name in PATHS}


@cache
def loaded_with(module: str) -> frozenset[str]:
    """All of the project's modules that are there once a module is imported."""
    seen, left = set(), [module]
    while left:
        for name in at_import(left.pop()) - seen:
            seen.add(name)
            left.append(name)
    return frozenset(seen)


def loads_torch(module: str) -> bool:
    """Whether torch or transformers is there once a module is imported."""
    loaded = [each for one in {module, *loaded_with(module)} for each in imports_of(one)]
    heavy = [each for each in loaded if each.module.split(".")[0] in HEAVY or each.module == "safetensors.torch"]
    return any(not each.within | each.typing for each in heavy)


def may_import(importer: str, imported: str) -> bool:
    ours, theirs = layer_of(importer), layer_of(imported)
    if imported == "dse" or imported in SCRIPTS:  # its version; what a command or an experiment runs
        return imported == "dse" or importer in SCRIPTS or ours in ("experiments", "commands")
    if theirs == "cli":
        return importer in SCRIPTS or ours in ("commands", "__main__")
    if importer in SCRIPTS:
        return True
    if ours == "cli":
        return LEVEL[theirs] < LEVEL["experiments"]
    return LEVEL[theirs] <= LEVEL[ours]


def test_every_module_belongs_to_a_layer():
    unknown = [name for name in PATHS if name not in SCRIPTS and layer_of(name) not in {*LEVEL, "cli", "dse"}]
    assert not unknown, "\n".join(unknown)


def test_imports_point_down():
    upward = [
        f"{name}:{each.line} imports {each.module}"
        for name in PATHS
        if name != "dse"
        for each in imports_of(name)
        if each.module in PATHS and not may_import(name, each.module)
    ]
    assert not upward, "\n".join(upward)


def test_no_circle():
    circles = [name for name in PATHS if name in loaded_with(name)]
    assert not circles, "\n".join(circles)


def test_imports_within_functions_only_put_torch_off():
    """None in a library module; elsewhere for what loads torch, so that -h and refusals are quick."""
    needless = [
        f"{name}:{each.line} imports {each.module} within a function"
        for name in PATHS
        for each in imports_of(name)
        if each.within and each.module in PATHS and (layer_of(name) in LIBRARY or not loads_torch(each.module))
    ]
    assert not needless, "\n".join(needless)


def test_light_modules_load_no_torch():
    modules = [name for name in PATHS if layer_of(name) in ("system", "data")] + list(LIGHT)
    code = f"""
import importlib, sys
for name in {modules!r}:
    importlib.import_module(name)
    loaded = [heavy for heavy in {HEAVY!r} if heavy in sys.modules]
    if loaded:
        sys.exit(f"{{name}} loads {{loaded}}")
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=LONG)
    assert run.returncode == 0, run.stderr


def lengths_of(module: str) -> Iterator[tuple[str, str, int]]:
    """(kind, place, lines) of a module and of the functions and classes in it."""
    yield "module", module, len(PATHS[module].read_text().splitlines())
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            kind = "class" if isinstance(node, ast.ClassDef) else "function"
            yield kind, f"{module}:{node.lineno} {node.name}", node.end_lineno - node.lineno + 1


@pytest.mark.parametrize("kind", MOST_LINES)
def test_nothing_is_too_long(kind):
    long = [
        f"{place} has {lines} lines"
        for module in PATHS
        for what, place, lines in lengths_of(module)
        if what == kind and lines > MOST_LINES[kind]
    ]
    assert not long, "\n".join(long)
