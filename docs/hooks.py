"""What mkdocs asks of this repository while it builds the site: `make docs`.

The README is the home page, and other files of the repository that pages link to become pages.  The
references of the config and of the command line are written from the code, in memory.
"""

from __future__ import annotations

import ast
import logging
import posixpath
import re
import types
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pydantic import BaseModel
from pydantic.fields import FieldInfo

ROOT = Path(__file__).resolve().parents[1]
log = logging.getLogger("mkdocs.hooks.referral")

# Pages of the site that lie elsewhere in the repository.
ELSEWHERE = {
    "index.md": "README.md",
    "evidence/characters.md": "benchmarks/characters/RESULTS.md",
    "how-to/serving.md": "examples/serving/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "reporting.md": "SECURITY.md",
    "changelog.md": "CHANGELOG.md",
}
WIDTH = 88  # columns of a help page
LINK = re.compile(r"(!?\[[^\]\n]*\]\()([^)\s#:]+)(#[^)\s]*)?(\))")
FILE_NAME = re.compile(r"^\[([\w/.-]+\.md)\]\($")  # a link whose words are a file's name
PIPELINE = "![The stages of a run](docs/pictures/pipeline.svg)"  # the README's diagram, drawn


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """A page that the navigation does not name stands at the end of How-to."""
    assert config.nav is not None
    named = set(_pages_of(config.nav))
    docs = Path(config.docs_dir)
    left = [path.relative_to(docs).as_posix() for path in sorted(docs.rglob("*.md"))]
    how_to = next(part["How-to"] for part in config.nav if "How-to" in part)
    how_to += [path for path in left if path not in named]
    return config


def _pages_of(nav: object) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    elif isinstance(nav, dict):
        for part in nav.values():
            yield from _pages_of(part)
    elif isinstance(nav, list):
        for part in nav:
            yield from _pages_of(part)


def _titles_of(nav: object) -> Iterator[tuple[str, str]]:
    """(page, what the navigation calls it)."""
    for part in nav if isinstance(nav, list) else []:
        for title, inner in part.items() if isinstance(part, dict) else []:
            if isinstance(inner, str):
                yield inner, title
            else:
                yield from _titles_of(inner)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path, source in ELSEWHERE.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, path, content=text))
    files.append(File.generated(config, "reference/keys.md", content=config_page()))
    files.append(File.generated(config, "reference/commands.md", content=commands_page()))
    for package in ("clustering", "ensemble", "networks"):
        path = f"reference/{package}.md"
        files.append(File.generated(config, path, content=package_page(package)))
    for name, text in linked_sources(files):
        files.append(File.generated(config, f"{FILES}/{name}", content=text))
    return files


FILES = "files"  # where a file that is no page lies in the site


def linked_sources(files: Files) -> list[tuple[str, str]]:
    """(path, content) of the repository's other files that pages link to."""
    found: dict[str, str] = {}
    for file in list(files.documentation_pages()):
        for match in LINK.finditer(file.content_string):
            source = _in_repository(match[2], file.src_uri)
            path = ROOT / source
            if not source.startswith("docs/") and source not in ELSEWHERE.values():
                if path.is_file():
                    found[source] = path.read_text(encoding="utf-8")
    return sorted(found.items())


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links between files of the repository become links between pages of the site."""
    source = page.file.src_uri

    titles = dict(_titles_of(config.nav))

    def relinked(match: re.Match[str]) -> str:
        target = _in_site(_in_repository(match[2], source))
        relative = posixpath.relpath(target, posixpath.dirname(source) or ".")
        words = FILE_NAME.sub(lambda name: f"[{titles.get(target, name[1])}](", match[1])
        return f"{words}{relative}{match[3] or ''}{match[4]}"

    if source == "index.md":
        markdown, count = re.subn(r"```mermaid\n.*?```", PIPELINE, markdown, flags=re.DOTALL)
        if count > 1:
            log.warning("README.md has %d diagrams, and the site a picture of one", count)
    return _kept_together(LINK.sub(relinked, markdown))


def _kept_together(markdown: str) -> str:
    """Numbers and their `±` and `%` on one line, but in code, which people copy."""
    lines, fenced = [], False
    for line in markdown.split("\n"):
        fenced ^= line.lstrip().startswith("```")
        if not fenced and not line.startswith("    "):
            line = re.sub(r"(?<=[\d*]) ± (?=\d)", "\u00a0±\u00a0", line)
            line = re.sub(r"(?<=\d) %(?=\W|$)", "\u00a0%", line)
        lines.append(line)
    return "\n".join(lines)


def _in_repository(link: str, page: str) -> str:
    """The file that a page's link leads to, as a path in the repository."""
    source = ELSEWHERE.get(page, f"docs/{page}")
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def _in_site(path: str) -> str:
    pages = {source: page for page, source in ELSEWHERE.items()}
    if path in pages:
        return pages[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else f"{FILES}/{path}"


# The config, from its model


def config_page() -> str:
    """Each section's keys with type, default and meaning, from pipeline.config."""
    from pipeline.config import Config

    lines = [
        "# Every key of the config",
        "",
        "Written from the code when the site is built. [The config](../config.md) shows the same",
        "keys as one commented file. A key that is not set keeps its default.",
        "",
        *_table_of("", Config, [name for name in Config.model_fields if name == "seed"]),
    ]
    for name, info in Config.model_fields.items():
        for title, model in sections_of(name, info):
            lines += ["", f"## [{title}]", "", *_introduction(title, model)]
            lines += ["", *_table_of(title, model, own_keys(title, model))]
    return "\n".join(lines) + "\n"


def sections_of(name: str, info: FieldInfo) -> Iterator[tuple[str, type[BaseModel]]]:
    """The tables that a field of the config stands for."""
    annotation = info.annotation
    if typing.get_origin(annotation) is dict:
        yield f"{name}.NAME", typing.get_args(annotation)[1]
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield name, annotation
        for key, inner in annotation.model_fields.items():
            if key == "default":
                yield from sections_of(f"{name}.{key}", inner)


def own_keys(title: str, model: type[BaseModel]) -> list[str]:
    """Without those that a section takes from [train], and without tables of its own."""
    from pipeline.config.schedule import Schedule

    inherits = issubclass(model, Schedule) and title != "train"
    left_out = set(Schedule.model_fields) if inherits else set()
    return [
        key
        for key, info in model.model_fields.items()
        if key not in left_out and not _is_table(info.annotation)
    ]


def _is_table(annotation: object) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _introduction(title: str, model: type[BaseModel]) -> list[str]:
    from pipeline.config.schedule import Schedule

    told = next(each.__doc__ for each in model.__mro__ if each.__doc__)
    lines = [_as_prose(told.strip())]
    if issubclass(model, Schedule) and title != "train":
        lines += [
            "",
            "It also has every key of [train](#train). An absent one is taken from there.",
        ]
    return lines


def _table_of(title: str, model: type[BaseModel], keys: Iterable[str]) -> list[str]:
    meanings = meanings_of(model)
    lines = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for key in keys:
        info = model.model_fields[key]
        if key not in meanings:
            raise ValueError(f"{title}.{key} has no comment above it that says what it is")
        cells = (info.alias or key, _type_text(info), _default_text(info), meanings[key])
        code, meaning = cells[:3], cells[3]
        lines.append(" | ".join(["", *(_code(cell) for cell in code), _cell(meaning), ""]).strip())
    return lines


def meanings_of(model: type[BaseModel]) -> dict[str, str]:
    """Key -> the comment above it, from the source of the model and of those it inherits from."""
    found: dict[str, str] = {}
    for each in reversed(model.__mro__):
        module = getattr(each, "__module__", "")
        if module.startswith("pipeline.config"):
            found |= comments_above(ROOT / f"{module.replace('.', '/')}.py", each.__name__)
    return found


def comments_above(path: Path, class_name: str) -> dict[str, str]:
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    found = {}
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.ClassDef) or node.name != class_name:
            continue
        for item in node.body:
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                comment = _comment_before(lines, item.lineno - 1)
                if comment:
                    found[item.target.id] = comment
    return found


def _comment_before(lines: list[str], index: int) -> str:
    words = []
    while index and lines[index - 1].strip().startswith("#"):
        index -= 1
        words.insert(0, lines[index].strip().lstrip("# "))
    return " ".join(words)


SHORT_TYPES = {"str": "text", "int": "whole number", "float": "number", "bool": "true or false"}


def _type_text(info: FieldInfo) -> str:
    text = _type_name(info.annotation)
    bounds = [_bound_text(each) for each in info.metadata]
    return ", ".join([text, *(each for each in bounds if each)])


def _type_name(annotation: object) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " or ".join(str(each) for each in arguments)
    if origin is typing.Annotated:
        return _type_name(arguments[0])
    if origin in (typing.Union, types.UnionType):
        names = [_type_name(each) for each in arguments if each is not type(None)]
        return " or ".join(dict.fromkeys(names))
    if origin is list:
        return f"list of {_type_name(arguments[0])}"
    if origin is dict:
        return "table"
    name = getattr(annotation, "__name__", str(annotation))
    return SHORT_TYPES.get(name, name)


SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def _bound_text(constraint: object) -> str:
    for name, sign in SIGNS.items():
        value = getattr(constraint, name, None)
        if value is not None:
            return f"{sign} {value}"
    return ""


def _default_text(info: FieldInfo) -> str:
    value = info.default
    if value is None:
        return "absent"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    return str(value)


def _code(text: str) -> str:
    return f"`{text}`"


def _cell(comment: str) -> str:
    text = _as_prose(comment).replace("|", r"\|")
    return text[0].upper() + text[1:] if text[:1].isalpha() else text


def _as_prose(text: str) -> str:
    """A comment's or docstring's words, with what Markdown would read as markup kept as it is."""
    parts = re.split(r"(`[^`]+`)", " ".join(text.split()))
    plain = [re.sub(r"([*_<\[\]{}])", r"\\\1", part) for part in parts[::2]]
    return "".join(part for pair in zip(plain, [*parts[1::2], ""], strict=True) for part in pair)


# The command line, from its parsers


def commands_page() -> str:
    """The help of every command, as it prints it."""
    import launch.cli

    lines = [
        "# The command line",
        "",
        "Written from the parsers when the site is built: what `referral NAME --help` prints.",
    ]
    group = typer.main.get_command(launch.cli.app)
    lines += ["", *_block(_help_of(group, launch.cli.NAME))]
    for name, command in group.commands.items():
        lines += ["", f"## referral {name}"]
        for text in helps_of(name, command):
            lines += ["", *_block(text)]
    return "\n".join(lines) + "\n"


def helps_of(name: str, command: typing.Any) -> list[str]:
    """A command's help, and those of its own commands."""
    import launch.cli
    from pipeline.choices import resolve
    from trainer.__main__ import COMMANDS

    if name not in launch.cli.PASSED_ON:
        return [_help_of(command, f"{launch.cli.NAME} {name}")]
    target = COMMANDS[launch.cli.PASSED_ON[name]]
    if name == "shards":
        from pipeline.typer_usage import application
        from trainer.commands import shards

        app = application("", "")
        shards.add_commands(app)
        kinds = typer.main.get_command(app).commands
        return [_help_of(each, f"referral shards {kind}") for kind, each in kinds.items()]
    return [resolve(f"{target.partition(':')[0]}:_parser")().format_help()]


def _help_of(command: typing.Any, path: str) -> str:
    with command.make_context(path, [], resilient_parsing=True) as context:
        formatter = context.make_formatter()
        command.format_help(context, formatter)
        return formatter.getvalue()


def _block(text: str) -> list[str]:
    return ["```text", *text.rstrip().splitlines(), "```"]


# Python, by mkdocstrings


def package_page(package: str) -> str:
    """The public names of a package, each where it is defined: mkdocstrings reads the sources."""
    from importlib import import_module

    module = import_module(package)
    summary = (module.__doc__ or "").strip().split("\n\n")[0]
    lines = [f"# {package}", "", _as_prose(summary), ""]
    for name in sorted(module.__all__, key=str.lower):
        lines += [f"::: {package}.{home_of(module, name)}.{name}", ""]
    return "\n".join(lines)


def home_of(module: types.ModuleType, name: str) -> str:
    homes: dict[str, str] = getattr(module, "_HOMES", None) or module._MODULE_OF
    return homes[name]
