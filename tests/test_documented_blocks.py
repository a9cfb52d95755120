"""Every block of code on the pages: commands are parsed, configs loaded, Python compiled."""

import ast
import importlib.util
import re
import shlex
import sys
import tomllib
import types
import typing
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest
from markdown_it import MarkdownIt
from pydantic import BaseModel

from pipeline.config import Config, UserError, load_config
from trainer.__main__ import COMMANDS, parse

ROOT = Path(__file__).parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "benchmarks").rglob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
]
OURS = ("clustering", "networks", "ensemble", "pipeline", "trainer", "launch", "referral")


class Block(NamedTuple):
    place: str
    language: str
    text: str


def blocks() -> Iterator[Block]:
    """Fenced and indented ones, those in lists and quotes too."""
    for page in PAGES:
        tokens = MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))
        for token in tokens:
            if token.type in ("fence", "code_block"):
                line = token.map[0] + 1 if token.map else 0
                yield Block(f"{page.relative_to(ROOT)}:{line}", token.info, token.content)


def spans() -> Iterator[tuple[str, str]]:
    """(place, text) of what stands between backticks in the sentences and tables."""
    for page in PAGES:
        tokens = MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))
        for token in tokens:
            for child in token.children or []:
                if child.type == "code_inline":
                    yield str(page.relative_to(ROOT)), child.content.replace("\\|", "|")


BLOCKS = list(blocks())


# Commands


def command_lines() -> list[tuple[str, str]]:
    """(place, command) of all blocks, remarks and prompts left out, continued lines joined."""
    found = []
    for block in BLOCKS:
        text = re.sub(r"\\\n\s*", "", block.text)
        for line in text.splitlines():
            line = re.sub(r"^\s*(?:\$ )?((?:[A-Z_]+=\S+ )*)", "", line)
            found.append((block.place, re.split(r"\s+#\s|; ", line)[0].strip()))
    return found


def commands_of(start: str) -> list[tuple[str, str]]:
    """Those of blocks and spans that begin with some words."""
    written = [*command_lines(), *spans()]
    found = [(place, line) for place, line in written if re.match(start, line)]
    assert found, start
    return found


def test_a_command_of_the_trainer_is_parsed():
    for place, line in commands_of(r"python -P -m trainer (?!STAGE)\S"):
        words = [word for word in shlex.split(line)[4:] if word != "..."]
        if not words or words[0] in COMMANDS or "NAME" in words:
            continue
        if "--run" not in words:
            words += ["--run", "runs/mine"]
        if words[0] == "bound":  # the stage that docs/extending.md adds
            continue
        try:
            assert parse(words).run, place
        except UserError as error:
            raise AssertionError(f"{place}: {line}") from error


def test_a_submission_by_hand_names_stages():
    for place, line in commands_of(r"sbatch .*stage\.sbatch DIR"):
        words = shlex.split(line.partition("stage.sbatch DIR ")[2].replace(" {0..11}", ""))
        assert parse([*words, "--run", "DIR"]).stages, place


def test_a_target_of_make_is_there():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.M))
    for place, line in commands_of(r"make [a-z]"):
        words = [word for word in line.split()[1:] if "=" not in word]
        assert set(words) <= targets, (place, line)


def test_a_script_that_is_called_is_there():
    for place, line in commands_of(r"python (?!-)\S+\.py"):
        script = line.split()[1]
        if "/" in script:
            assert (ROOT / script).is_file(), (place, line)


def source_of(module: str) -> str:
    """A benchmark's source, with that of the modules of its folder that share its options."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin, module
    if spec.submodule_search_locations:
        spec = importlib.util.find_spec(f"{module}.__main__")
        assert spec is not None and spec.origin, module
    path = Path(spec.origin)
    shared = [path, path.parent / "runs.py", ROOT / "benchmarks" / "papers" / "lab.py"]
    return "\n".join(each.read_text(encoding="utf-8") for each in shared if each.is_file())


def test_a_benchmark_has_the_options_that_it_is_called_with():
    sys.path.insert(0, str(ROOT))
    try:
        found = [*commands_of(r"(?:taskset -c 0 )?python -m benchmarks\.\w+")]
        assert len(found) > 20
        for place, line in found:
            module, *words = line.partition("python -m ")[2].split()
            source = source_of(module.rstrip("."))
            for option in (word for word in words if word.startswith("--")):
                name = option.partition("=")[0].rstrip("]`,")
                field = name[2:].replace("-", "_")  # some options are the fields of a class
                assert f'"{name}"' in source or f"{field}:" in source, (place, line, name)
    finally:
        sys.path.remove(str(ROOT))


def test_an_extra_that_is_installed_is_one():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = set(project["project"]["optional-dependencies"])
    for place, line in [*command_lines(), *spans()]:
        if line.startswith("pip install"):
            named = re.findall(r"\[([a-z,]+)\]", line)
            assert set(",".join(named).split(",")) - {""} <= extras, (place, line)


# Configs

SECTIONS = set(Config.model_fields)


def configs() -> list[tuple[str, dict]]:
    """Blocks that are TOML with sections of ours, whatever language they name."""
    found = []
    for block in BLOCKS:
        try:
            values = tomllib.loads(block.text)
        except tomllib.TOMLDecodeError:
            assert block.language != "toml", block.place
            continue
        if values and set(values) <= SECTIONS:
            found.append((block.place, values))
    return found


def test_a_config_that_a_page_shows_is_accepted():
    found = configs()
    assert len(found) >= 12
    for place, values in found:
        try:
            load_config(None, [], values)
        except UserError as error:
            raise AssertionError(f"{place}: {error}") from error


def keys_of(model: type[BaseModel]) -> set[str]:
    return {info.alias or name for name, info in model.model_fields.items()}


def sections() -> dict[str, set[str]]:
    """Each table of the config -> its keys, with a student in place of all students."""
    found = {}
    for name, info in Config.model_fields.items():
        annotation = info.annotation
        if typing.get_origin(annotation) is dict:
            found[f"{name}.main"] = keys_of(typing.get_args(annotation)[1])
        elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
            found[name] = keys_of(annotation)
    return found


def settings() -> list[tuple[str, str, str]]:
    """(page, key, value) of spans as `overlap = 2` whose key is one of the config."""
    known = set().union(*sections().values())
    found = set()
    for page, span in spans():
        match = re.fullmatch(r"(\w+) = (\S.*)", span)
        if match and match[1] in known:
            found.add((page, match[1], match[2]))
    return sorted(found)


BESIDE = {
    "head_blocks": ["students.main.network=hydra", "ensemble.kind=deep"],
    "embedding": ["specialists.kind=branch"],
    "blocks": ["specialists.kind=branch"],
    "views": ["specialists.kind=branch"],
    "members": ["ensemble.kind=deep"],
    "random": ["ensemble.kind=rerank", "ensemble.members=2"],
    "k": ["ensemble.kind=rerank", "ensemble.members=2"],
    "leave_out": ["students.main.steps=1"],
    "bias_correction": ['students.main.leave_out=["3"]'],
}


def accepted(section: str, key: str, value: str) -> bool:
    wanted = [f"{section}.{key}={value}"]
    kinds = [[], ["ensemble.kind=deep"], ["ensemble.kind=shortlist", "ensemble.members=2"]]
    kinds += [["ensemble.kind=rerank", "ensemble.members=2"], ["specialists.kind=branch"]]
    kinds += [["model.head=cosine"], ["students.main.temperature=2"], BESIDE.get(key, [])]
    for others in kinds:
        try:
            load_config(None, [*others, *wanted])
        except UserError:
            continue
        return True
    return False


@pytest.mark.parametrize("page, key, value", settings())
def test_a_value_in_a_sentence_is_one_of_a_section_that_has_the_key(page, key, value):
    having = [section for section, keys in sections().items() if key in keys]
    assert any(accepted(section, key, value) for section in having), (page, key, value)


def test_sentences_have_enough_values_to_be_worth_the_test():
    values = {(key, value) for _, key, value in settings()}
    assert len(values) > 30
    assert {("kind", '"shortlist"'), ("overlap", "2"), ("combine", '"kl"')} <= values


# Python


def python_blocks() -> list[tuple[str, ast.Module]]:
    """Those that name the language, and those that begin with an import."""
    found = []
    for block in BLOCKS:
        is_row = re.match(r"# \S+\.py: [A-Z_]+\n", block.text)  # of a dict: docs/extending.md
        begins = re.match(r"(?:from \w+ import|import \w+)", block.text)
        if is_row or not (block.language == "python" or begins):
            continue
        try:
            found.append((block.place, ast.parse(block.text)))
        except SyntaxError as error:
            raise AssertionError(f"{block.place}: {error}") from error
    return found


def test_python_on_a_page_compiles_and_imports_names_that_exist():
    found = python_blocks()
    assert len(found) >= 12
    imported = 0
    for place, module in found:
        for node in ast.walk(module):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in OURS:
                assert node.module
                source: types.ModuleType = import_module(node.module)
                for name in node.names:
                    assert hasattr(source, name.name), (place, node.module, name.name)
                    imported += 1
    assert imported >= 20
