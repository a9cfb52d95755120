"""What each row of the table of metrics is, with the numbers that make it fair or not."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from pipeline.choices import STUDENT_METHODS
from pipeline.config import Ensemble, Specialists, Student
from pipeline.controls import best_wall, wall_rate
from pipeline.graph import RunDirectory
from pipeline.results import count, percent, read_file
from pipeline.results.formats import ABSENT

from .evidence import Evidence
from .formatting import colours_of

PERTURBATIONS = {
    "gaussian": "Gaussian noise",
    "ods": "output diversified sampling",
    "conf_ods": "ConfODS",
}
STARTS = {"generalist": "as the generalist", "scratch": "from fresh weights"}


@dataclass(frozen=True)
class Explanation:
    name: str
    colour: str
    text: str


def explanations(evidence: Evidence) -> list[Explanation]:
    config, results = evidence.run.config, evidence.results
    texts = {
        "generalist": _explain_generalist(evidence.run),
        "ensemble": _explain_ensemble(config.ensemble, _fitted_shortlist(evidence.run)),
    }
    if evidence.run.method.has_groups:
        texts["ensemble"] += _explain_start(config.specialists)
    controls = {
        "control_wall": _explain_control_wall,
        "control_compute": _explain_control_compute,
        "student_hard": _explain_student_hard,
    }
    for name, explain in controls.items():
        if name in results["controls"]:
            texts[name] = explain(evidence.run)
    for name, student in config.students.items():
        if name in results["students"]:
            texts[f"student {name}"] = explain_student(student, config.ensemble)
    colours = colours_of(evidence.rows)
    return [Explanation(name, colours[name], text) for name, text in texts.items()]


def _explain_generalist(run: RunDirectory) -> str:
    if not run.method.has_groups:
        return "One network for all classes, the first member of the ensemble."
    if run.config.specialists.starts_elsewhere:
        return (
            "One network for all classes. It decides which specialists are asked, and answers "
            "beside them; controls start from its weights."
        )
    return (
        "One network for all classes. Everything else starts from its weights or its predictions."
    )


def _fitted_shortlist(run: RunDirectory) -> dict:
    """What ensemble.json says of a shortlist; empty of other ensembles."""
    if run.config.ensemble.kind != "shortlist":
        return {}
    return read_file(run.ensemble, "ensemble.json") or {}


def _explain_ensemble(ensemble: Ensemble, fitted: dict) -> str:
    """fitted: of a shortlist, what was chosen on val."""
    if ensemble.kind == "deep":
        mean = "geometric mean" if ensemble.combine == "geometric" else "mean"
        return (
            f"{ensemble.members} networks, trained alike from different seeds, and the {mean} of "
            "their distributions (Lakshminarayanan et al. 2017)."
        )
    if ensemble.kind == "shortlist":
        count = ensemble.members + len(ensemble.networks)
        length, order = fitted.get("shortlist", ABSENT), fitted.get("order", ABSENT)
        return (
            f"{count} networks: the generalist, and others of the same classes that are asked "
            f"about its {length} likeliest classes of each example. Their distributions are joined "
            f"there by a generalised mean of order {order} (0 geometric, 1 arithmetic); outside, "
            "the generalist's answer stands."
        )
    if ensemble.gate == 1:
        gate = "the generalist's most probable class"
    else:
        gate = f"one of the generalist's {ensemble.gate} most probable classes"
    asked = ""
    if ensemble.shortlist is not None:
        asked = (
            f" They are asked about its {ensemble.shortlist} likeliest classes of each example, "
            "and joined there; outside, the generalist's answer stands."
        )
    return (
        f"The generalist and the specialists whose group holds {gate}, "
        f"joined to one distribution by eq. 5 of Hinton et al. 2015.{asked}"
    )


def _explain_start(specialists: Specialists) -> str:
    """A further sentence on the ensemble, where specialists start as another network."""
    if not specialists.starts_elsewhere:
        return ""
    if specialists.given_start:
        return (
            f" The specialists start as the network of {specialists.given_start}, whose training "
            "is not counted here; it is not asked itself."
        )
    return (
        " The specialists start as another generalist, trained from another seed: its training "
        "counts in what the ensemble cost, and it is not asked itself."
    )


def _explain_control_wall(run: RunDirectory) -> str:
    rates, best = run.config.controls.learning_rates, best_wall(run)
    seen, chosen = "", ""
    if best is not None:
        seen = _examples_seen(run, best)
        chosen = f"; {wall_rate(run.config, best):.2g} was best"
    return (
        "The generalist trained on, without groups, for as many further examples as one specialist "
        f"sees{seen}: what the same wall-clock time would have given, where all specialists train "
        f"side by side. Of the peak rates {', '.join(f'{rate:.2g}' for rate in rates)} the one "
        f"with the lowest loss on the val split is shown{chosen}."
    )


def _explain_control_compute(run: RunDirectory) -> str:
    others = ""
    if any(stage.kind.trains for stage in run.members):
        others = " and the other generalist that they start as"
    return (
        "The generalist trained on, without groups, for as many further examples as all "
        f"specialists{others} saw together{_examples_seen(run, 'control_compute')}, at the same "
        "rate: what "
        "equal total compute does for a single network. Where the generalist is not yet converged "
        "this is the one hard to beat. The search for the rate is not charged."
    )


def _explain_student_hard(run: RunDirectory) -> str:
    return (
        "The twin of the student main: the same network, start, steps and order of examples, but "
        "hard labels only. The difference between the two is what its teacher taught."
    )


def _examples_seen(run: RunDirectory, control: str) -> str:
    """` (1.20 M)`, or nothing where the control's summary does not say."""
    stage = run.controls.get(control)
    summary = read_file(stage, "summary.json") if stage else None
    if not summary or summary.get("examples_seen") is None:
        return ""
    return f" ({count(summary['examples_seen'])})"


# Students


def explain_student(student: Student, ensemble: Ensemble) -> str:
    """What a student is, whom it learns from, and what a prediction of it costs."""
    network, cost = _network_and_cost(student, student.members or ensemble.members)
    start = STARTS.get(student.start, f"as the student {student.start}")
    targets, data = _targets(student, ensemble), _data(student)
    return f"{network}, trained on {targets}{data}, starting {start}. {cost}"


def _network_and_cost(student: Student, members: int) -> tuple[str, str]:
    options = ", ".join(f"{key} {value}" for key, value in student.model.items())
    size = f"with {options}" if options else "of the generalist’s size"
    if student.network == "hydra":
        return (
            f"A Hydra {size}: one body, {members} heads",
            "At inference the body runs once, and every head.",
        )
    if student.network == "batch_ensemble":
        return (
            f"A BatchEnsemble {size}: {members} members, which share all but rank-one factors of "
            "their weights",
            "At inference it costs a forward pass for each member.",
        )
    return f"One network {size}", "At inference it costs one forward pass."


def _targets(student: Student, ensemble: Ensemble) -> str:
    if not student.learns_from_teacher:
        return STUDENT_METHODS[student.method].learns
    text = f"{_possessive(student.teacher)} distributions as targets"
    if math.isinf(student.temperature):
        text += ", their logits matched"
    elif student.temperature != 1:
        text += f" at temperature {student.temperature:g}"
    if student.hard_weight:
        text += f" and the labels with weight {student.hard_weight:.2g}"
    teachers_of_its_own = ensemble.kind == "deep" and student.teacher == "ensemble"
    if teachers_of_its_own and student.network != "single":
        text += ", each member from one of its own"
    return text


def _data(student: Student) -> str:
    """What is unusual about the examples that a student sees."""
    text = ""
    if student.perturb != "none":
        text += f", at inputs moved by {PERTURBATIONS[student.perturb]}"
    if student.share < 1:
        text += f", with {percent(student.share, 1)} of the training examples"
    if student.leave_out:
        plural = "es" if len(student.leave_out) > 1 else ""
        text += f", without examples of {len(student.leave_out)} class{plural}"
        if student.bias_correction:
            text += ", whose biases were then corrected on val"
    return text


def _possessive(teacher: str) -> str:
    if "/" in teacher:
        return f"{Path(teacher).name}'s"
    if teacher in ("ensemble", "generalist"):
        return f"the {teacher}'s"
    return f"the student {teacher}'s"
