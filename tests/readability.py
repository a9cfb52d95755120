"""How long the sentences are that people read here: docs, docstrings and comments.

    python tests/readability.py [--sentences N] [FILE ...]      (make readability)

One row for each page and for each package's docstrings and comments.  Exits with 1 where a page,
all pages, all docstrings and comments or everything is above BARS.  A package by itself may be.
With --sentences it also prints the N longest sentences of each row above, with their lines.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import io
import re
import sys
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    "clustering", "networks", "ensemble", "pipeline", "trainer", "launch", "referral", "slurm",
    "benchmarks", "examples", "docs", "requirements", "tests",
)  # fmt: skip
LONG = 40  # words of a sentence that has to be read twice
CODE_WIDTH = 90
FEWEST_WORDS = 3  # of a sentence. What is shorter is a name or a number
FEWEST_CELL_WORDS = 10  # of a table's cell that is prose


@dataclass(frozen=True)
class Bars:
    """The most that a row may have."""

    mean: float = 18.0
    long_percent: float = 4.0
    semicolons: float = 2.0  # in 1,000 words
    wide: int = 0


BARS = Bars()


@dataclass(frozen=True)
class Sentence:
    text: str
    words: int
    place: str


@dataclass
class Reading:
    """What one page, or one package, asks of its reader."""

    name: str
    sentences: list[Sentence] = field(default_factory=list)
    semicolons: int = 0
    wide: list[str] = field(default_factory=list)

    @property
    def words(self) -> int:
        return sum(sentence.words for sentence in self.sentences)

    @property
    def mean(self) -> float:
        return self.words / max(1, len(self.sentences))

    @property
    def long_percent(self) -> float:
        long = sum(sentence.words > LONG for sentence in self.sentences)
        return 100 * long / max(1, len(self.sentences))

    @property
    def semicolons_per_1000(self) -> float:
        return 1000 * self.semicolons / max(1, self.words)

    @property
    def above(self) -> list[str]:
        """Which bars it does not hold.  One long sentence, or one semicolon, is forgiven."""
        long = self.long_percent * len(self.sentences) / 100
        tests = {
            "words": self.mean > BARS.mean,
            "long": self.long_percent > BARS.long_percent and long > 1,
            "semicolons": self.semicolons_per_1000 > BARS.semicolons and self.semicolons > 1,
            "wide": len(self.wide) > BARS.wide,
        }
        return [name for name, failed in tests.items() if failed]

    def read(self, text: str, place: str) -> None:
        """Count a block of prose: a paragraph, an item of a list, a cell of a table."""
        for sentence in sentences_of(text):
            words = count_words(sentence)
            if words >= FEWEST_WORDS:
                self.sentences.append(Sentence(sentence, words, place))
        self.semicolons += text.count(";")

    def read_code(self, lines: Iterable[str], place: str) -> None:
        self.wide += [f"{place}: {line}" for line in lines if len(line) > CODE_WIDTH]

    def add(self, other: Reading) -> None:
        self.sentences += other.sentences
        self.semicolons += other.semicolons
        self.wide += other.wide


# Words and sentences

ABBREVIATIONS = ("e.g.", "i.e.", "et al.", "eq.", "cf.", "vs.", "etc.", "Fig.", "no.", "approx.")
HIDDEN = "\N{ONE DOT LEADER}"  # stands for a full stop that ends no sentence


def sentences_of(text: str) -> list[str]:
    """Split at a full stop, question or exclamation mark before a space."""
    text = " ".join(text.split())
    for short in ABBREVIATIONS:
        hidden = short.replace(".", HIDDEN)
        text = re.sub(rf"(?<![\w.]){re.escape(short)}", hidden, text)
    parts = re.split(r"(?<=[.!?])[\"')\]*_]*\s+", text)
    return [part.replace(HIDDEN, ".") for part in parts]


def count_words(text: str) -> int:
    """Whatever has a letter or a digit between two spaces."""
    return sum(any(letter.isalnum() for letter in word) for word in text.split())


# Markdown


def read_markdown(reading: Reading, text: str, path: str) -> None:
    """Paragraphs, items and long cells are prose.  Headings, code and short cells are not."""
    if text.startswith("---\n"):
        text = text.split("\n---\n", 1)[1]
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    inside: list[str] = []
    for token in tokens:
        place = f"{path}:{token.map[0] + 1 if token.map else '?'}"
        if token.nesting == 1:
            inside.append(token.type)
        elif token.nesting == -1:
            inside.pop()
        elif token.type in ("fence", "code_block"):
            reading.read_code(token.content.splitlines(), place)
        elif token.type == "inline" and "heading_open" not in inside:
            prose = prose_of(token)
            cell = inside[-1] in ("td_open", "th_open")
            if not cell or count_words(prose) >= FEWEST_CELL_WORDS:
                reading.read(prose, place)


def prose_of(token: Token) -> str:
    """Without markup. A code span is one word, and a link is its text."""
    parts = []
    for child in token.children or []:
        if child.type == "text":
            parts.append(child.content)
        elif child.type == "code_inline":
            parts.append("code")
        elif child.type in ("softbreak", "hardbreak"):
            parts.append(" ")
    return "".join(parts)


# Python


def read_python(docstrings: Reading, comments: Reading, text: str, path: str) -> None:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node, clean=False)
            if docstring:
                line = node.body[0].lineno
                read_docstring(docstrings, inspect.cleandoc(docstring), f"{path}:{line}")
    for line, comment in comments_of(text):
        comments.read(comment, f"{path}:{line}")


def read_docstring(reading: Reading, text: str, place: str) -> None:
    """Blocks between empty lines. A block that is indented as a whole is code."""
    for block in re.split(r"\n\s*\n", text):
        lines = block.splitlines()
        if all(line.startswith("    ") for line in lines):
            reading.read_code(lines, place)
            continue
        for part in parts_of(lines):
            reading.read(code_spans_as_words(part), place)


STARTS_PART = re.compile(r"\s*(?:[*-] |\d+\. |[\w*.\[\], |]+ : |[a-z_][\w.\[\]*]*: )")


def parts_of(lines: list[str]) -> list[str]:
    """Items, and parameters in numpydoc's form or as `name: what it is`, stand by themselves."""
    parts: list[str] = []
    starts = True
    for line in lines:
        if re.fullmatch(r"\s*-{3,}\s*", line):
            parts.pop()  # the heading above a line
            starts = True
        elif starts or STARTS_PART.match(line):
            parts.append(line)
            starts = " : " in line and STARTS_PART.match(line) is not None
        else:
            parts[-1] += f" {line.strip()}"
    return parts


def code_spans_as_words(text: str) -> str:
    return re.sub(r"``?[^`]+``?", "code", text)


DIRECTIVE = re.compile(r"#(?:!|:| *(?:noqa|type:|fmt:|pragma|pyright:|ruff:))")


def comments_of(text: str) -> Iterator[tuple[int, str]]:
    """(line, text) of each comment. Lines of the same column below each other are one."""
    block: list[str] = []
    first, last, column = 0, -1, -1
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type != tokenize.COMMENT or DIRECTIVE.match(token.string):
            continue
        line, start = token.start
        alone = not token.line[:start].strip()
        words = token.string.lstrip("#").strip()
        if alone and line == last + 1 and start == column:
            block.append(words)
        else:
            if block:
                yield first, code_spans_as_words(" ".join(block))
            block, first, column = [words], line, start if alone else -1
        last = line
    if block:
        yield first, code_spans_as_words(" ".join(block))


# All of it


def pages() -> list[Path]:
    """What a reader opens: pages of the docs, of the root, and results of benchmarks."""
    named = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
    docs = sorted((ROOT / "docs").rglob("*.md"))
    others = [sorted((ROOT / name).rglob("*.md")) for name in ("benchmarks", "examples")]
    return [*named, *docs, *others[0], *others[1]]


def read_pages(paths: Iterable[Path]) -> list[Reading]:
    readings = []
    for path in paths:
        name = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
        reading = Reading(name)
        read_markdown(reading, path.read_text(encoding="utf-8"), name)
        readings.append(reading)
    return readings


def read_packages(names: Iterable[str] = PACKAGES) -> list[Reading]:
    """Two rows a package: docstrings, and comments."""
    readings = []
    for package in names:
        docstrings, comments = Reading(f"{package}, docstrings"), Reading(f"{package}, comments")
        for path in sorted((ROOT / package).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            read_python(docstrings, comments, text, str(path.relative_to(ROOT)))
        readings += [each for each in (docstrings, comments) if each.sentences]
    return readings


def read_files(paths: Iterable[Path]) -> list[Reading]:
    readings = []
    for path in map(Path.resolve, paths):
        if path.suffix == ".md":
            readings += read_pages([path])
        else:
            reading = Reading(str(path.relative_to(ROOT)))
            read_python(reading, reading, path.read_text(encoding="utf-8"), reading.name)
            readings.append(reading)
    return readings


def joined(name: str, readings: Iterable[Reading]) -> Reading:
    total = Reading(name)
    for reading in readings:
        total.add(reading)
    return total


def everything() -> tuple[list[Reading], list[Reading]]:
    """(all rows, those of them that must hold the bars): each page and the totals."""
    of_pages, of_packages = read_pages(pages()), read_packages()
    all_pages = joined("all pages", of_pages)
    totals = [
        joined("all docstrings and comments", of_packages),
        joined("all", [*of_pages, *of_packages]),
    ]
    rows = [*of_pages, all_pages, *of_packages, *totals]
    return rows, [*of_pages, all_pages, *totals]


def table(readings: Iterable[Reading]) -> str:
    form = "{:32} {:>6} {:>9} {:>6} {:>8} {:>10} {:>5}  {}"
    heads = ("", "words", "sentences", "mean", "above 40", "semicolons", "wide", "")
    lines = [form.format(*heads).rstrip()]
    for each in readings:
        cells = (
            each.name, f"{each.words:,}", f"{len(each.sentences):,}", f"{each.mean:.1f}",
            f"{each.long_percent:.1f} %", f"{each.semicolons_per_1000:.1f}", len(each.wide),
            "above: " + ", ".join(each.above) if each.above else "",
        )  # fmt: skip
        lines.append(form.format(*cells).rstrip())
    lines.append(
        f"Bars: mean {BARS.mean:g} words, {BARS.long_percent:g} % above {LONG} words, "
        f"{BARS.semicolons:g} semicolons in 1,000 words, no line of code above {CODE_WIDTH}."
    )
    return "\n".join(lines)


def longest(reading: Reading, count: int) -> Iterator[str]:
    for sentence in sorted(reading.sentences, key=lambda each: -each.words)[:count]:
        yield f"{sentence.place}: {sentence.words}: {sentence.text}"
    yield from reading.wide[:count]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--sentences", type=int, default=0, metavar="N")
    parser.add_argument("files", nargs="*", type=Path)
    args = parser.parse_args()
    if args.files:
        readings = held = read_files(args.files)
    else:
        readings, held = everything()
    print(table(readings))
    for reading in readings:
        if reading.above and args.sentences:
            print(f"\n{reading.name}")
            print("\n".join(longest(reading, args.sentences)))
    return 1 if any(reading.above for reading in held) else 0


if __name__ == "__main__":
    sys.exit(main())
