"""Who may import whom, read from every import statement of the tree."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {
    "clustering": set(),
    "networks": set(),
    "ensemble": {"networks", "clustering"},
    "pipeline": {"clustering", "networks", "ensemble"},  # TORCHLESS modules alone
    "trainer": {"clustering", "networks", "ensemble", "pipeline"},
    "launch": {"pipeline"},
    "referral": {"clustering", "networks", "ensemble", "pipeline", "launch"},
}
TORCHLESS = {"births", "choices", "checksums", "regular", "temporaries"}
# Login nodes run pipeline and launch, where none of these is installed.
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


def files(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def statements(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """The import statements that run, inside functions too. Not those for type checkers."""
    for node in ast.iter_child_nodes(tree):
        is_typing = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif not is_typing:
            yield from statements(node)


def imports(path: Path) -> set[str]:
    """The absolute names of the modules that a file imports, and of what it imports from them."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    names = set()
    for node in statements(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
            continue
        above = package[: len(package) - node.level + 1] if node.level else ()
        module = ".".join([*above, *([node.module] if node.module else [])])
        names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_graph() -> dict[str, set[str]]:
    """Each of our modules and those of ours that it imports.

    A name that a package exports lazily is the package's, not a module's.
    """
    modules = {module_name(path): path for room in ROOMS for path in files(room)}
    graph = {}
    for name, path in modules.items():
        targets = imports(path) & modules.keys()
        # `from .package import module` runs the module. The package is only on the way.
        graph[name] = {
            target
            for target in targets - {name}
            if not any(other.startswith(f"{target}.") for other in targets)
        }
    return graph


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_the_rooms_below_it(room):
    for path in files(room):
        foreign = {name.split(".")[0] for name in imports(path)}
        foreign &= ROOMS.keys() - ROOMS[room] - {room}
        assert not foreign, f"{path.relative_to(ROOT)} imports {foreign}"


@pytest.mark.parametrize("room", ["pipeline", "launch", "referral"])
def test_a_room_of_login_nodes_imports_nothing_heavy(room):
    for path in files(room):
        heavy = {name.split(".")[0] for name in imports(path)} & HEAVY
        assert not heavy, f"{path.relative_to(ROOT)} imports {heavy}"


def test_of_the_rooms_with_mathematics_the_pipeline_knows_choices_and_the_safety_of_files_alone():
    for path in files("pipeline"):
        for name in imports(path):
            if name.split(".")[0] in ROOMS["pipeline"]:
                module = name.split(".")[1] if "." in name else ""
                assert module in TORCHLESS or name in ROOMS, f"{path} imports {name}"


def test_what_login_nodes_import_needs_no_torch():
    modules = [
        module_name(path) for room in ("pipeline", "launch", "referral") for path in files(room)
    ]
    program = f"import sys\nimport {', '.join(modules)}\nprint(*sys.modules)"
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert not HEAVY & {name.split(".")[0] for name in ran.stdout.split()}


def test_of_clustering_the_ensemble_knows_the_groups_alone():
    for path in files("ensemble"):
        names = {name for name in imports(path) if name.startswith("clustering")}
        names -= {"clustering", "clustering.ClassGroups"}
        wrong = {name for name in names if not name.startswith("clustering.groups")}
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_inside_the_trainer_a_reader_goes_downwards():
    """stages/ -> core/loop -> core/objectives -> core/losses. Data, engines are side rooms."""
    order = ["stages", "core.loop", "core.objectives", "core.losses"]
    for position, below in enumerate(order[1:], 1):
        names = imports(ROOT / "trainer" / (below.replace(".", "/") + ".py"))
        for above in order[:position]:
            upwards = {name for name in names if name.startswith(f"trainer.{above}")}
            assert not upwards, f"trainer/{below} imports {upwards}"
    for room in ("core", "data", "engines", "distributed"):
        for path in files(f"trainer/{room}"):
            upwards = {
                name
                for name in imports(path)
                if name.startswith(("trainer.stages", "trainer.commands", "trainer.session"))
            }
            assert not upwards, f"{path.relative_to(ROOT)} imports {upwards}"


def test_no_module_imports_itself_through_others():
    graph = import_graph()
    finished: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        if module in trail:
            circle = " -> ".join([*trail[trail.index(module) :], module])
            raise AssertionError(f"import circle: {circle}")
        if module in finished:
            return
        for target in sorted(graph[module]):
            visit(target, (*trail, module))
        finished.add(module)

    for module in graph:
        visit(module, ())
