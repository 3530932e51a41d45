"""The walls of the house: which room may know which."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "tandem"
FOUNDATION = {
    "allocator",
    "types",
    "errors",
    "config",
    "pipeline_config",
    "consistency",
    "recipe",
    "text",
    "world",
    "__init__",
}
MIDDLE = {"cluster", "data", "models", "rollout", "rewards", "engine", "run", "health", "view", "plan"}
ALLOWED = {
    "types": set(),
    "errors": set(),
    "__init__": set(),
    "config": {"consistency"},
    "consistency": {"config"},
    "pipeline_config": {"config"},
    "recipe": {"config", "pipeline_config", "errors"},
    "text": {"errors"},
    "world": {"errors", "types"},
    "launch": {"world"},
    "algo": {"algo"},
    **{room: FOUNDATION | {"algo", room} for room in MIDDLE},
}
ALLOWED["rewards"] |= {"models"}
LIGHT = [
    "tandem.algo",
    "tandem.stages.joint",
    "tandem.config",
    "tandem.cli",
    "tandem.health.imports",
    "tandem.view",
    "tandem.view.evaluation",
]


def imports(path: Path) -> set[str]:
    """The rooms that a file imports from."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        modules = []
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "tandem":
            modules = [node.module] if node.module != "tandem" else [f"tandem.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names if alias.name.split(".")[0] == "tandem"]
        rooms |= {[*module.split("."), "__init__"][1] for module in modules}
    return rooms


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_rooms_import_only_what_stands_below(room):
    files = [SOURCE / f"{room}.py"] if (SOURCE / f"{room}.py").exists() else list((SOURCE / room).rglob("*.py"))
    assert files
    for path in files:
        assert imports(path) <= ALLOWED[room], path


def test_stages_do_not_know_the_command_line():
    for path in (SOURCE / "stages").rglob("*.py"):
        assert not imports(path) & {"cli", "demo"}, path


@pytest.mark.parametrize("module", LIGHT)
def test_light_imports_stay_light(module):
    heavy = ("transformers", "datasets", "peft", "vllm", "ray")
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("module", ["tandem.cluster.pool", "tandem.stages.over_ray"])
def test_ray_is_imported_only_where_a_recipe_asks_for_it(module):
    found = subprocess.run(
        [sys.executable, "-c", f"import sys, {module}; print('ray' in sys.modules)"], capture_output=True, text=True
    )
    assert found.stdout.strip() == "False", found.stderr


def test_health_needs_no_torch():
    code = (
        "import sys, tandem.health.imports, tandem.health.words; print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False False"
