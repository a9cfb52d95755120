"""README.md of an export: a model card as model hubs read it, YAML in front of Markdown.

Names of classes and runs are other people's texts.  In the YAML they are JSON strings, in the
Markdown every character that could be markup is escaped.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from networks import ModelSpec
from pipeline.config import UserError
from pipeline.redaction import shown
from pipeline.results import Results, Row, count, named_rows, number, percent
from pipeline.version import DISTRIBUTION, VERSION

CARD_FILE = "README.md"
UNKNOWN = "unknown"  # the license that hubs write where nobody gave one
LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
SHOWN = 20  # names of classes
QUANTILE = 1.959964  # of the normal distribution, two-sided 95 %
MARKUP = re.compile(r"([\\`*_{}\[\]()#+\-.!|~<>&$:@])")


@dataclass
class Card:
    """What a card says.

    run: the run's name.  spec: of the generalist, or of the only student.  rows: the exported
    predictors' names in results.json, best known first.  results: None of a run that has none.
    """

    run: str
    spec: ModelSpec
    rows: Sequence[str]
    results: Results | None
    seed: int
    programs: Sequence[str]
    license: str = UNKNOWN

    def text(self) -> str:
        return f"---\n{self._front_matter()}---\n\n{self._body()}"

    @property
    def task(self) -> str:
        """The hub's name of the task, by what the network reads."""
        inputs = self.spec.input
        if "txt" in (inputs.decoders or {}) or inputs.is_indices:
            return "text-classification"
        return "image-classification" if len(inputs.shape) == 3 else "tabular-classification"

    def measured(self) -> dict[str, Row]:
        """The rows of results.json that the export holds."""
        if self.results is None:
            return {}
        named = named_rows(self.results)
        return {name: named[name] for name in self.rows if name in named}

    # In front

    def _front_matter(self) -> str:
        content: dict[str, Any] = {
            "license": self.license,
            "library_name": DISTRIBUTION,
            "pipeline_tag": self.task,
            "tags": ["referral", "safetensors", *(["onnx"] if _has_onnx(self.programs) else [])],
        }
        measured = self.measured()
        if measured:
            content["metrics"] = ["accuracy"]
            content["model-index"] = [
                {"name": _one_line(self.run), "results": [self._result(measured)]}
            ]
        # JSON is YAML. A key a line reads as people write it.
        return "".join(f"{key}: {json.dumps(value)}\n" for key, value in content.items())

    def _result(self, measured: dict[str, Row]) -> dict:
        metrics = []
        for name, row in measured.items():
            metrics.append({"type": "accuracy", "name": f"top-1, {name}", "value": row["top1"]})
            if row["nll"] is not None:
                metrics.append({"type": "nll", "name": f"NLL, {name}", "value": row["nll"]})
        dataset = {"name": "the run's own data", "type": "custom", "split": "test"}
        return {"task": {"type": self.task}, "dataset": dataset, "metrics": metrics}

    # Behind

    def _body(self) -> str:
        parts = [
            f"# {escaped(self.run)}",
            f"A classifier over {len(self.spec.class_names):,} classes, by Referral {VERSION}.",
            self._contents(),
            "## Measured",
            self._table(),
            "## Intended use",
            self._use(),
            "## Classes",
            self._classes(),
            "## How to load it",
            self._loading(),
        ]
        return "\n\n".join(parts) + "\n"

    def _contents(self) -> str:
        what = {
            "ensemble": "the ensemble: a generalist and the networks that are joined with it",
            "generalist": "the generalist alone",
        }
        lines = [f"* {what.get(name, escaped(name) + ', one network')}" for name in self.rows]
        return "It holds:\n\n" + "\n".join(lines)

    def _table(self) -> str:
        measured = self.measured()
        if not measured:
            return "Nothing is known: the run was exported before it was evaluated."
        sizes = sorted({row["n"] for row in measured.values()})
        lines = [
            f"On the test split of the run's own data, {' or '.join(f'{n:,}' for n in sizes)} "
            f"examples, seed {self.seed}. The interval is Wilson's of 95 % for that many examples; "
            "it holds neither the variation between seeds nor that of other data.",
            "",
            "| | n | top-1 | 95 % | top-5 | NLL | ECE | parameters | multiplications |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for name, row in measured.items():
            low, high = wilson(row["top1"], row["n"])
            cells = [
                escaped(name),
                f"{row['n']:,}",
                percent(row["top1"]),
                f"{100 * low:.2f} to {100 * high:.2f}",
                percent(row["top5"]),
                number(row["nll"]),
                number(row["ece"]),
                count(row.get("parameters")),
                count(row.get("multiplications")),
            ]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)

    def _use(self) -> str:
        inputs = self.spec.input
        shape = " x ".join(map(str, inputs.shape))
        return (
            "It says which of its classes an input is, of inputs like those that it learned from: "
            f"{inputs.dtype} of {shape}, raw; model.json says how they are scaled. It has no "
            'answer "none of these": of an input of another kind it names some class all the same. '
            "Groups and weights were chosen on the run's val split. Nobody has examined it for "
            "bias, or for uses in which a wrong answer does harm."
        )

    def _classes(self) -> str:
        names = self.spec.class_names
        listed = ", ".join(escaped(name) for name in names[:SHOWN])
        more = f", and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
        return f"{len(names):,}: {listed}{more}. All of them are in model.json."

    def _loading(self) -> str:
        student = next((name.partition(" ")[2] for name in self.rows if "student" in name), "")
        whole = "ensemble" in self.rows
        option = "" if whole else f" --student {shlex.quote(student)}"
        lines = ["```sh", f"referral predict THIS_DIRECTORY inputs/ --top 5{option}", "```", ""]
        lines.append("```python")
        if whole:
            lines += [
                "from referral import load_ensemble",
                "",
                'load_ensemble("THIS_DIRECTORY").predict(inputs, top=5)',
            ]
        else:
            place = json.dumps(f"THIS_DIRECTORY/students/{student}")
            lines += ["from referral import load_classifier", "", f"load_classifier({place})"]
        lines.append("```")
        if _has_onnx(self.programs):
            names = ", ".join(escaped(name) for name in self.programs if name.endswith(".onnx"))
            lines += ["", f"For onnxruntime, raw inputs to probabilities: {names}, in programs/."]
        lines += ["", "`sha256sum -c SHA256SUMS` tells whether its files are whole."]
        return "\n".join(lines)


def check_license(name: str) -> str:
    """A license's identifier as hubs write it.  Raises UserError for another text."""
    if not LICENSE.fullmatch(name):
        raise UserError(
            f"--license {name}: write an identifier in lower case, e.g. apache-2.0, mit, cc-by-4.0"
        )
    return name


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share of n examples.  Wilson 1927."""
    if n == 0:
        return 0.0, 1.0
    z2 = QUANTILE**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = QUANTILE * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def escaped(text: str) -> str:
    """A text in which Markdown, HTML and tables see no markup. Secrets of URLs are hidden."""
    return MARKUP.sub(r"\\\1", _one_line(text)).replace("\\<", "&lt;").replace("\\>", "&gt;")


def _one_line(text: str) -> str:
    return " ".join(shown(text).split())


def _has_onnx(programs: Sequence[str]) -> bool:
    return any(name.endswith(".onnx") for name in programs)
