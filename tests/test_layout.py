"""Imports go one way: tools, benchmark and tests -> scripts -> experiment -> the environment, and never in a circle."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("mamujoco_env", "experiment", "kalei_", "tools", "benchmark", "tests")  # the lowest first
FOLDERS = (ROOT, ROOT / "experiment", ROOT / "tools", ROOT / "benchmark", ROOT / "tests")
# {name as in an import: file}; tests import one another by their bare names, which the order has no say in
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for folder in FOLDERS
    for path in sorted(folder.glob("*.py"))
}


def layer_of(module):
    """Its number; a copy of a script counts as a script, whatever its name."""
    scripts = LAYERS.index("kalei_")
    return next((number for number, name in enumerate(LAYERS) if module.startswith(name)), scripts)


def imported(module):
    """Our modules that a module imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports say whole names"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found & MODULES.keys()


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module):
    for other in imported(module):
        assert layer_of(other) <= layer_of(module), f"{module} imports {other}"
        assert not (module.startswith("kalei_") and other.startswith("kalei_")), "each script stands alone"


def test_imports_go_in_no_circle():
    left = {module: imported(module) for module in MODULES}
    while free := {module for module, others in left.items() if not others & left.keys()}:
        left = {module: others for module, others in left.items() if module not in free}
    assert not left, f"a circle among {', '.join(left)}"


def test_the_rule_has_something_to_forbid():
    assert {"experiment.checkpoints", "mamujoco_env"} <= imported("kalei_matd3_mamujoco")
    assert {"experiment.command_line", "experiment.processes"} <= imported("experiment.checkpoints")
