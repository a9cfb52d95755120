"""Who may import whom: design.md's rooms, read from every import statement of the tree."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {
    "clustering": set(),
    "networks": set(),
    "ensemble": {"networks", "clustering"},
    "trainer": {"clustering", "networks", "ensemble"},
    "launch": {"trainer"},
}
# Files that run on login nodes, where torch is not installed, and what of ours they may import.
TORCHLESS = ["pipeline.config", "pipeline.store", "pipeline.results", "pipeline.compare"]
HEAVY = {
    "torch",
    "torchvision",
    "timm",
    "deepspeed",
    "webdataset",
    "sklearn",
    "scipy",
    "matplotlib",
    "PIL",
    "jinja2",
}


def imports(path: Path) -> set[str]:
    """The absolute names of the modules that a file imports, inside functions too."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def files(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_the_rooms_below_it(room):
    for path in files(room):
        foreign = {name.split(".")[0] for name in imports(path)} & (
            ROOMS.keys() - ROOMS[room] - {room}
        )
        assert not foreign, f"{path.relative_to(ROOT)} imports {foreign}"


def test_of_clustering_the_ensemble_knows_the_groups_alone():
    for path in files("ensemble"):
        names = {name for name in imports(path) if name.startswith("clustering")}
        wrong = {name for name in names if name not in ("clustering", "clustering.ClassGroups")}
        wrong = {name for name in wrong if not name.startswith("clustering.groups")}
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_the_launcher_imports_of_the_trainer_only_what_needs_no_torch():
    for path in files("launch"):
        for name in imports(path):
            if name.startswith("trainer.") and name != "pipeline.store":
                assert name.startswith(tuple(TORCHLESS)), f"{path.relative_to(ROOT)} imports {name}"
            assert name.split(".")[0] not in HEAVY, f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("module", TORCHLESS)
def test_what_the_launcher_imports_needs_no_torch(module):
    path = ROOT / (module.replace(".", "/") + ".py")
    heavy = {name.split(".")[0] for name in imports(path)} & HEAVY
    assert not heavy, f"{module} imports {heavy}"


def test_inside_the_trainer_a_reader_goes_downwards():
    order = ["stages", "loop", "objectives", "losses"]
    for position, module in enumerate(order):
        names = imports(ROOT / "trainer" / f"{module}.py")
        above = {f"trainer.{other}" for other in order[:position]}
        assert not names & above, f"trainer/{module}.py imports {names & above}"
