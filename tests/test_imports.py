"""Imports point one way, host-only modules stay free of JAX, and importing the package starts nothing."""

from __future__ import annotations

import ast
import importlib.util
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("engine", "kernels", "sharding")

# The parts of `engine` from the top down: a part may import from its own line and from any line below it.
# `kernels` and `sharding` are at the bottom and see neither the engine nor each other.
LAYERS = """
    __init__ batch bench convert generate ray_data ray_serve serve server
    llm
    replicas startup
    core
    chat_messages chat_template detokenizer pre_tokenizers stop_strings tokenizer tokenizer_files vocab
    pooling profiler runner
    compiler
    hosts
    layout
    executables kv_scales memory speculation step step_input weights
    scheduler
    slots
    models sampler
    command_line config
    pages speculative_config
    request
"""
LEVEL = {part: level for level, line in enumerate(LAYERS.strip().splitlines()) for part in line.split()}
HOST_ONLY = ("engine.request", "engine.pages", "engine.scheduler", "engine.config", "engine.speculative_config")
DEVICE_LIBRARIES = {"jax", "jaxlib", "flax", "orbax"}

Imports = dict[str, set[tuple[str, bool]]]  # module -> (what it imports, whether it is imported for type checkers only)


def module_name(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


def statements(node: ast.AST, typing_only: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Yields every import statement below `node`, in functions too, and whether only a type checker sees it."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child, typing_only
        guarded = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        yield from statements(child, typing_only or guarded)


def imports_of(name: str, source: str, modules: set[str]) -> set[tuple[str, bool]]:
    """-> the modules that `source` imports; `from package import module` counts as an import of that module."""
    package = name if MODULES.get(name, ROOT).name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for statement, typing_only in statements(ast.parse(source)):
        if isinstance(statement, ast.Import):
            found |= {(alias.name, typing_only) for alias in statement.names}
            continue
        origin = importlib.util.resolve_name("." * statement.level + (statement.module or ""), package)
        for alias in statement.names:
            inner = f"{origin}.{alias.name}"
            found.add((inner if inner in modules else origin, typing_only))
    return found


def is_ours(name: str) -> bool:
    return name.partition(".")[0] in PACKAGES


def part_of(name: str) -> str:
    """-> the part of the engine that a module belongs to: engine.server.app -> server."""
    return name.split(".")[1] if "." in name else "__init__"


def level(name: str) -> int:
    """-> the line of LAYERS that a module is on; one that is missing there counts as the top."""
    return LEVEL.get(part_of(name), 0)


def wrong_ways(imports: Imports) -> list[str]:
    """-> every import that points the wrong way."""
    wrong = []
    for name, targets in imports.items():
        for target in {target for target, _ in targets if is_ours(target)}:
            package, target_package = name.partition(".")[0], target.partition(".")[0]
            upwards = package == target_package == "engine" and level(name) > level(target)
            if upwards or (package != "engine" and target_package != package):
                wrong.append(f"{name} imports {target}")
    return sorted(wrong)


def cycles(imports: Imports) -> list[str]:
    """-> the import cycles, as far as they take place when the program runs."""
    graph = {name: {t for t, typing_only in imports[name] if not typing_only} & set(imports) for name in imports}
    while leaves := {name for name, targets in graph.items() if not targets}:
        graph = {name: targets - leaves for name, targets in graph.items() if name not in leaves}
    return sorted(f"{name} -> {', '.join(sorted(targets))}" for name, targets in graph.items())


def closure(name: str, imports: Imports) -> set[str]:
    """-> everything that a module imports when the program runs, through our own modules."""
    seen: set[str] = set()
    left = [name]
    while left:
        for target, typing_only in imports.get(left.pop(), ()):
            if not typing_only and target not in seen:
                seen.add(target)
                left.append(target)
    return seen


@pytest.fixture(scope="module")
def imports() -> Imports:
    return {name: imports_of(name, path.read_text(), set(MODULES)) for name, path in MODULES.items()}


def run_python(code: str, **environment: str) -> None:
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | environment, check=True, timeout=120)


def test_every_part_of_the_engine_has_its_layer():
    assert {part_of(name) for name in MODULES if name.startswith("engine")} - LEVEL.keys() == set()


def test_imports_point_one_way(imports):
    assert wrong_ways(imports) == []


def test_no_import_cycle(imports):
    assert cycles(imports) == []


@pytest.mark.parametrize("name", HOST_ONLY)
def test_host_only_modules_import_no_device_library(imports, name):
    assert {target.partition(".")[0] for target in closure(name, imports)} & DEVICE_LIBRARIES == set()
    run_python(f"import sys, {name}; assert not {DEVICE_LIBRARIES!r} & sys.modules.keys()")


def test_importing_the_package_is_quick_and_starts_no_backend():
    run_python("import sys, engine; assert not {'jax', 'transformers', 'tokenizers'} & sys.modules.keys()")
    # No such platform: were a backend started, it would fail.
    run_python("from engine import LLM, SamplingParams", JAX_PLATFORMS="none-such")


@pytest.mark.parametrize(
    ("name", "source", "wrong"),
    [
        ("engine.pages", "from engine.scheduler import plan", True),
        ("engine.pages", "def f():\n    import engine.core", True),
        ("engine.models.layers", "from engine import runner", True),
        ("engine.models.layers", "from ..weights.gguf import x", True),
        ("kernels.attention", "from engine.config import EngineConfig", True),
        ("sharding.rules", "import kernels", True),
        ("engine.server.app", "from engine.server import protocol", False),
        ("engine.step", "import jax\nfrom kernels import attention\nfrom engine.config import EngineConfig", False),
        ("kernels.reference", "from kernels.attention import x", False),
    ],
)
def test_the_rules_know_right_from_wrong(name, source, wrong):
    modules = {"engine.runner", "engine.scheduler", "engine.server.protocol", "kernels.attention"}
    assert bool(wrong_ways({name: imports_of(name, source, modules)})) == wrong


def test_a_cycle_is_found_unless_only_type_checkers_see_it():
    imports: Imports = {"a": {("b", False)}, "b": {("c", False)}, "c": {("a", False)}, "d": {("a", False)}}
    assert cycles(imports) == ["a -> b", "b -> c", "c -> a", "d -> a"]
    assert cycles(imports | {"c": {("a", True)}}) == []
