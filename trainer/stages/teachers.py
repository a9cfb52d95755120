"""Teachers: whose predictions a student learns."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ensemble import (
    DeepEnsemble,
    MeanLogits,
    ShortlistEnsemble,
    SpecialistEnsemble,
    load_ensemble,
)
from ensemble.listed import Listed
from ensemble.listed_ensemble import Wanted, rows_of_block
from networks import Classifier, InputSpec, load_classifier, member_log_probabilities
from pipeline.config import Student, UserError

from ..core.perturbations import mix_bags, perturb
from ..core.probabilities import safe_log
from ..session import Session
from .joining import load_ensemble as load_ensemble_of_run
from .networks import builders_of, load_network

TYPICAL = 512  # classes that an answer lists beside those of its groups


@dataclass
class Teacher:
    """predict: raw inputs [B, ...] -> probabilities [K, B, C] of its K members.

    logits: per member a function raw inputs -> logits [B, C] that can be differentiated by the
    inputs. None where the prediction is more than a network's.
    mean_logits: raw inputs -> the mean of the members' logits [B, C], that of their geometric mean.
    None where the prediction is more than networks'.
    joint_logits: raw inputs -> the log of the one prediction of a joined ensemble, [B, C]. None
    where `predict` alone gives it.
    """

    predict: Callable[[Tensor], Tensor]
    num_members: int
    logits: list[Callable[[Tensor], Tensor]] = field(default_factory=list)
    mean_logits: Callable[[Tensor], Tensor] | None = None
    joint_logits: Callable[[Tensor], Tensor] | None = None
    listed: Callable[[Tensor, Wanted], Iterator[Listed]] | None = None
    rows: int | None = None

    def logits_for_single(self, mean: str) -> Callable[[Tensor], Tensor] | None:
        """Raw inputs -> what a single student learns of all members, as logits [B, C].

        Each row is up to a constant.  None where only probabilities are to be had.
        """
        if self.joint_logits is not None:
            return self.joint_logits
        return self.mean_logits if mean == "geometric" else None


def find_teacher(session: Session, student: Student) -> Teacher:
    """Whom `students.NAME.teacher` names: ensemble, generalist, a student, or a path."""
    name = student.teacher
    if name == "ensemble":
        return of_ensemble(load_ensemble_of_run(session))
    if name == "generalist":
        return of_networks([load_network(session, session.run.generalist)])
    if name in session.run.students:
        return of_networks([load_network(session, session.run.students[name])])
    return from_elsewhere(name, session)


def from_elsewhere(path: str, session: Session) -> Teacher:
    """The ensemble of a run or of a bundle, or the network that save_classifier wrote."""
    builders, device, root = builders_of(session.config), session.ranks.device, Path(path)
    try:
        if (root / "ensemble.json").is_file():
            ensemble = load_ensemble(root, device, builders)
            teacher, names = of_ensemble(ensemble), ensemble.class_names
        else:
            if (root / "generalist").is_dir():
                root = root / "generalist"
            network = load_classifier(root, device, builders)
            teacher, names = of_networks([network]), list(network.spec.class_names)
    except (OSError, ValueError) as error:
        raise UserError(f"teacher = {path}: {error}") from None
    if names != list(session.class_names):
        raise UserError(
            f"teacher = {path} knows other classes ({len(names)}) than the data "
            f"({session.num_classes})"
        )
    return teacher


def of_ensemble(ensemble: SpecialistEnsemble | DeepEnsemble | ShortlistEnsemble) -> Teacher:
    """Each network of a deep ensemble is a member. Any other ensemble is one."""
    if isinstance(ensemble, DeepEnsemble):
        return of_networks(ensemble.networks)
    if isinstance(ensemble, ShortlistEnsemble):
        program = ensemble.program
        return Teacher(
            lambda raw: program(raw)[None], 1, joint_logits=lambda raw: safe_log(program(raw))
        )
    teacher = Teacher(lambda raw: ensemble.forward_with_details(raw).q[None], 1)
    if ensemble.is_sparse:
        teacher.listed = partial(_listed, ensemble)
        teacher.rows = rows_of_block(ensemble, TYPICAL)
    return teacher


def _listed(ensemble: SpecialistEnsemble, raw: Tensor, wanted: Wanted) -> Iterator[Listed]:
    for answers in ensemble.ask_in_blocks(raw, wanted):
        yield answers.join(ensemble.weights)


def of_networks(networks: Sequence[Classifier]) -> Teacher:
    """All members of all networks."""
    count = sum(network.num_members for network in networks)

    def predict(raw: Tensor) -> Tensor:
        with torch.no_grad():
            parts = [member_log_probabilities(network.eval(), raw) for network in networks]
            return torch.cat(parts).exp()

    logits = [member_logits(network, k) for network in networks for k in range(network.num_members)]
    return Teacher(predict, count, logits, MeanLogits(networks))


def member_logits(network: Classifier, k: int) -> Callable[[Tensor], Tensor]:
    """A function raw inputs -> logits [B, C] of one member."""

    def logits(raw: Tensor) -> Tensor:
        of_all = network(raw)
        return of_all[k] if of_all.dim() == 3 else of_all

    return logits


def check_members(name: str, student: Student, teacher_members: int, student_members: int) -> None:
    """Raises UserError where student and teacher have different numbers of members."""
    if student_members > 1 and teacher_members != student_members:
        raise UserError(
            f"students.{name} has {student_members} members, its teacher "
            f"{os.path.basename(student.teacher)} {teacher_members}: member k learns from member "
            'k, so give it as many, or network = "single"'
        )


def perturbation(
    name: str, student: Student, teacher: Teacher, inputs: InputSpec
) -> Callable[[Tensor], Tensor]:
    """A function raw inputs -> raw inputs moved by `student.perturb`."""
    if student.perturb == "mix_bags":
        if not inputs.is_indices:
            raise UserError(
                f'students.{name}.perturb = "mix_bags" is of bags of indices, as the decoder '
                f"ngram_bag makes them; these are {inputs.dtype}"
            )
        return partial(mix_bags, share=student.perturb_share)
    if inputs.dtype != "uint8":
        raise UserError(
            f"students.{name}.perturb moves pictures, uint8 scaled to 0..1; "
            f"these are {inputs.dtype}"
        )
    if student.perturb != "gaussian" and not teacher.logits:
        raise UserError(
            f'students.{name}.perturb = "{student.perturb}" follows the gradient of a network; '
            'networks that are joined are none: teacher = "generalist", or '
            'perturb = "gaussian"'
        )
    scale = inputs.scale
    networks = [lambda x, logits=logits: logits(x / scale) for logits in teacher.logits]

    def move(raw: Tensor) -> Tensor:
        x = raw.float() * scale
        moved = perturb(student.perturb, x, student.perturb_size, student.temperature, networks)
        return moved / scale

    return move
