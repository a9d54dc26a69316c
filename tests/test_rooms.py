"""The rooms import one way: what docs/architecture.md draws is what the code does."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "qiusuo"
MAY_IMPORT = {
    "kernels": set(),
    "model": {"kernels"},
    "data": set(),
    "runs": set(),
    "checkpoint": {"model", "kernels", "data"},
    "engine": {"model", "kernels", "checkpoint", "data"},
    "evaluation": {"engine", "tasks", "data", "version"},
    "training": {
        "tasks",
        "evaluation",
        "model",
        "kernels",
        "data",
        "checkpoint",
        "runs",
        "engine",
        "version",
    },
    "tasks": set(),
    "server": {"model", "data", "checkpoint", "engine", "runs", "version"},
}


def imported_rooms(file: Path) -> set[str]:
    """Rooms of ours that a file imports, relative imports and lazy ones included."""
    package = ("qiusuo", *file.relative_to(SOURCE).parts[:-1])
    rooms = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = list(package[: len(package) - node.level + 1]) if node.level else []
            names = [".".join([*above, node.module or ""])]
        else:
            continue
        rooms |= {name.split(".")[1] for name in names if name.startswith("qiusuo.")}
    return rooms


@pytest.mark.parametrize("room", sorted(MAY_IMPORT))
def test_a_room_imports_only_what_stands_below_it(room: str) -> None:
    files = sorted((SOURCE / room).rglob("*.py"))
    assert files
    for file in files:
        surplus = imported_rooms(file) - MAY_IMPORT[room] - {room}
        assert not surplus, f"{file.relative_to(SOURCE)} imports {', '.join(sorted(surplus))}"


def test_every_folder_is_a_room_with_rules() -> None:
    folders = {path.relative_to(SOURCE).parts[0] for path in SOURCE.glob("*/**/*.py")}
    assert folders == set(MAY_IMPORT)
