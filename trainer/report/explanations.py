"""What each row of the table of metrics is, with the numbers that make it fair or not."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from pathlib import Path

from pipeline.choices import CONTROL_ROWS, STUDENT_METHODS
from pipeline.config import Config, Ensemble, Specialists, Student
from pipeline.controls import best_wall, possible_twins, wall_rate
from pipeline.graph import RunDirectory
from pipeline.results import Row, count, percent, read_file
from pipeline.results.formats import ABSENT, mean_words

from .evidence import Evidence
from .formatting import colours_of

PERTURBATIONS = {
    "gaussian": "Gaussian noise",
    "ods": "output diversified sampling",
    "conf_ods": "ConfODS",
    "mix_bags": "n-grams of other examples",
}
FAR = 0.1  # nats from which stored answers are not the teacher's. trainer.stages.targets says so
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
        "ensemble": _explain_ensemble(config, _fitted_shortlist(evidence.run)),
    }
    if evidence.run.method.has_groups:
        texts["ensemble"] += _explain_start(config.specialists)
    for name, row in results["controls"].items():
        texts[name] = _explain_control(evidence.run, name, row)
    for name, student in config.students.items():
        if name in results["students"]:
            answers = _answers_of(evidence.run, name)
            texts[f"student {name}"] = explain_student(student, config.ensemble, answers)
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
    """What ensemble.json says of a shortlist. Empty of other ensembles."""
    if not run.config.ensemble.asks_shortlists:
        return {}
    return read_file(run.ensemble, "ensemble.json") or {}


def _explain_ensemble(config: Config, fitted: dict) -> str:
    """fitted: of a shortlist, what was chosen on val."""
    ensemble = config.ensemble
    if ensemble.kind == "deep":
        mean = "geometric mean" if ensemble.combine == "geometric" else "mean"
        origin = "trained alike from different seeds"
        if ensemble.networks:
            origin = f"{len(ensemble.networks)} of them trained elsewhere"
        return (
            f"{ensemble.num_networks} networks, {origin}, and the {mean} of their distributions "
            "(Lakshminarayanan et al. 2017)."
        )
    if ensemble.asks_shortlists:
        learnt = ""
        if config.has_rerankers:
            learnt = (
                f"trained on its {config.rerank.k} likeliest classes of each example, and "
                f"{config.rerank.random} drawn ones of each batch, and "
            )
        count = ensemble.num_networks
        length, order = fitted.get("shortlist", ABSENT), fitted.get("order")
        mean = "a generalised mean" if order is None else mean_words(order)
        return (
            f"{count} networks: the generalist, and others of the same classes that are {learnt}"
            f"asked about its {length} likeliest classes of each example. Their distributions are "
            f"joined there by {mean}; outside, the generalist's answer stands."
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
    seen, chosen, kept = "", "", ""
    if best is not None:
        seen, kept = _examples_seen(run, best), _kept_step(run, best)
        if _best_step(run, best) != 0:
            chosen = f"; {wall_rate(run.config, best):.2g} was best"
    return (
        "The generalist trained on, without groups, for as many further examples as one specialist "
        f"saw{seen}: what the same wall-clock time would have given, where all specialists train "
        f"side by side. {kept}Of the peak rates "
        f"{', '.join(f'{rate:.2g}' for rate in rates)} the one with the lowest calibrated loss on "
        f"the val split is shown{chosen}."
    )


def _explain_control_compute(run: RunDirectory) -> str:
    others = ""
    if any(stage.kind.trains for stage in run.members):
        others = " and the other generalist that they start as"
    share, compute = "as many further examples as", "equal total compute"
    if run.config.controls.max_share != 1:
        percentage = f"{100 * run.config.controls.max_share:g} %"
        share = f"{percentage} (controls.max_share) as many further examples as"
        compute = f"{percentage} of their compute"
    return (
        f"The generalist trained on, without groups, for {share} all "
        f"specialists{others} saw together{_examples_seen(run, 'control_compute')}, at the rate "
        f"that ended best in control_wall: what {compute} does for a single network. "
        f"{_kept_step(run, 'control_compute')}Where "
        "the generalist is not yet converged this is the one hard to beat. The search for the rate "
        "is not charged."
    )


def _explain_train_on(run: RunDirectory) -> str:
    return (
        "The generalist trained on for as long again, by the same schedule from its start: what "
        "further steps give without another network. "
        f"{_kept_step(run, 'train_on')}".rstrip()
    )


def _explain_wider(run: RunDirectory) -> str:
    options = ", ".join(f"{key} {value}" for key, value in run.config.controls.model.items())
    size = "its layers widened until it multiplies as much for an example as the ensemble does"
    if options:
        size = f"with {options}, as controls.model says"
    return (
        f"A generalist trained as the first one was, from scratch, {size}: what the same work at "
        "inference gives without groups."
    )


def _explain_average(run: RunDirectory) -> str:
    return (
        "The generalist and a second one, trained alike from another seed, and the mean of their "
        "distributions: what diversity gives without groups."
    )


def _explain_shortlist(run: RunDirectory) -> str:
    fitted = read_file(run.controls["shortlist"], "ensemble.json") or {}
    length = fitted.get("shortlist", ABSENT)
    return (
        f"The same two, but the second one is asked about the {length} likeliest classes of the "
        "first one alone, which costs its trunk and so many rows of its head; joined there by a "
        "geometric mean, fitted on val."
    )


CONTROLS = {
    "control_wall": _explain_control_wall,
    "control_compute": _explain_control_compute,
    "train_on": _explain_train_on,
    "wider": _explain_wider,
    "average": _explain_average,
    "shortlist": _explain_shortlist,
}


def _explain_control(run: RunDirectory, name: str, row: Row) -> str:
    if name in CONTROLS:
        return CONTROLS[name](run)
    return _explain_twin(possible_twins(run.config).get(name, "main"))


def _explain_twin(student: str) -> str:
    return (
        f"The twin of the student {student}: the same network, start, steps and order of examples, "
        "but hard labels only. The difference between the two is what its teacher taught."
    )


def missing_rows(evidence: Evidence) -> dict | None:
    """What was not made, each with what it is, and the line that makes it. None if nothing."""
    missing = evidence.results.get("missing_controls")
    if not missing:
        return None
    twin_of = possible_twins(evidence.run.config)
    what = [
        f"{name} ({CONTROL_ROWS[name].what})"
        if name in CONTROL_ROWS
        else f"{name} (the student {twin_of[name]} on labels alone)"
        for name in missing["names"]
    ]
    root = str(evidence.run.root.resolve())
    command = missing["command"].replace("--run RUN", f"--run {shlex.quote(root)}", 1)
    return {"listed": "; ".join(what), "command": command}


def _kept_step(run: RunDirectory, control: str) -> str:
    """Which step it kept, if not the last one."""
    best = _best_step(run, control)
    if best is None:
        return ""
    if best == 0:
        return "No step was better on val than its start, so it is the generalist itself. "
    return f"Its best step on val is kept, {best:,}. "


def _best_step(run: RunDirectory, control: str) -> int | None:
    """None where it is the last one, as it always was in earlier versions."""
    stage = run.controls.get(control)
    if stage is None or not stage.is_done:
        return None
    summary = read_file(stage, "summary.json") or {}
    best = summary.get("best_step")
    return None if best == summary.get("steps") else best


def _examples_seen(run: RunDirectory, control: str) -> str:
    """` (1.20 M)`, or nothing where the control's summary does not say."""
    stage = run.controls.get(control)
    summary = read_file(stage, "summary.json") if stage else None
    if not summary or summary.get("examples_seen") is None:
        return ""
    return f" ({count(summary['examples_seen'])})"


# Students


def explain_student(student: Student, ensemble: Ensemble, answers: dict | None = None) -> str:
    """What a student is, whom it learns from, and what a prediction of it costs.

    answers: how its teacher answered, as its summary.json has it.
    """
    network, cost = _network_and_cost(student, student.members or ensemble.num_networks)
    start = STARTS.get(student.start, f"as the student {student.start}")
    targets, data = _targets(student, ensemble), _data(student)
    text = f"{network}, trained on {targets}{data}, starting {start}. {cost}"
    return text + _answers(answers or {})


def _answers_of(run: RunDirectory, name: str) -> dict | None:
    """How a student's teacher answered. None where an older version did not write it."""
    return (read_file(run.students[name], "summary.json") or {}).get("answers")


def _answers(answers: dict) -> str:
    """How far stored answers are from the teacher's, and how sure it was."""
    return _stored(answers) + _certainty(answers.get("entropy"))


def _certainty(entropy: dict | None) -> str:
    if entropy is None:
        return ""
    return (
        f" Its teacher's answers have a mean entropy of {entropy['seen']:.2g} nats about what "
        f"the student sees and {entropy['val']:.2g} about val."
    )


def _stored(answers: dict) -> str:
    lost = answers.get("kl")
    if lost is None:
        return ""
    text = (
        f" Its teacher's answers were stored, {lost:.2g} nats (KL) from the whole distribution at "
        f"temperature {answers['temperature']:g}."
    )
    if lost > FAR:
        text += (
            " That is far: with answers = “live”, or more of them stored (answers_mass, "
            "answers_bytes), it learns what its teacher says."
        )
    return text


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
    if student.wrong_weight == 1:
        text += ", and where these are wrong on the labels alone"
    elif student.wrong_weight:
        text += f", and where these are wrong with {student.wrong_weight:.2g} of it on the labels"
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
