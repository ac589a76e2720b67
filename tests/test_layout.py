"""Who imports whom: what a reader may rely on when reading or taking away a file."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FRONT = {"bilevel", "lisa", "model", "data", "shard", "train", "evaluate"}
FILES = [p for p in ROOT.glob("**/*.py") if "tests" not in p.parts and ".venv" not in p.parts]
MODULES = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in FILES}


def imported(file):
    """The names of this project's modules that a file imports, and of all others by their root."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= inside & MODULES.keys() or {node.module}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name if name in MODULES else name.split(".")[0] for name in names}


def test_seven_modules_stand_in_front_and_no_two_import_each_other_in_a_circle():
    assert {name for name in MODULES if "." not in name} == FRONT
    assert len([name for name in MODULES if not name.endswith("__init__")]) <= 24
    below = {name: imported(file) & MODULES.keys() for name, file in MODULES.items()}
    while leaves := {name for name, uses in below.items() if not uses & below.keys()}:
        below = {name: uses for name, uses in below.items() if name not in leaves}
    assert not below, f"a circle within {sorted(below)}"


@pytest.mark.parametrize("name", ["bilevel", "lisa", "model", "data"])
def test_what_is_read_first_does_not_import_one_another(name):
    uses = imported(MODULES[name])
    assert not uses & FRONT
    if name in ("bilevel", "lisa"):
        assert uses - set(sys.stdlib_module_names) == {"torch"}


def test_only_benchmarks_and_tests_import_the_loop():
    users = {name for name, file in MODULES.items() if "train" in imported(file)}
    assert all(name.startswith("benchmarks.") for name in users)
