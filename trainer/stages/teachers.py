"""Teachers: who answers a student, live or once for all."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ensemble import DeepEnsemble, SpecialistEnsemble, load_ensemble
from networks import Classifier, InputSpec, load_classifier, member_log_probabilities
from pipeline.config import Student, UserError

from ..core.perturbations import perturb
from ..session import Session, builders_of

Answer = Callable[[Tensor], Tensor]  # raw inputs [B, ...] -> probabilities [K, B, C] of K members


@dataclass
class Teacher:
    """answer: probabilities [K, B, C] of its K members for raw inputs [B, ...].

    members: per member a function raw inputs -> logits [B, C] that can be differentiated by the inputs; none where the
    answer is more than a network's.
    """

    answer: Answer
    num_members: int
    members: list[Callable[[Tensor], Tensor]] = field(default_factory=list)


def find_teacher(session: Session, student: Student) -> Teacher:
    """Whom `students.NAME.teacher` names: the run's ensemble, its generalist, another student, or a path."""
    name = student.teacher
    if name == "ensemble":
        return of_ensemble(session.ensemble())
    if name == "generalist":
        return of_networks([session.load(session.run.generalist)])
    if name in session.run.students:
        return of_networks([session.load(session.run.students[name])])
    return from_elsewhere(name, session)


def from_elsewhere(place: str, session: Session) -> Teacher:
    """The ensemble of a run or of a bundle, or the network that save_classifier wrote."""
    builders, device, root = builders_of(session.config), session.ranks.device, Path(place)
    try:
        if (root / "ensemble.json").is_file():
            found = load_ensemble(root, device, builders)
            teacher, names = of_ensemble(found), found.class_names
        else:
            root = root / "generalist" if (root / "generalist").is_dir() else root
            network = load_classifier(root, device, builders)
            teacher, names = of_networks([network]), list(network.spec.class_names)
    except (OSError, ValueError) as mistake:
        raise UserError(f"teacher = {place}: {mistake}") from None
    if names != list(session.class_names):
        raise UserError(
            f"teacher = {place} knows other classes ({len(names)}) than the data ({session.num_classes})"
        )
    return teacher


def of_ensemble(ensemble: SpecialistEnsemble | DeepEnsemble) -> Teacher:
    """Each network of a deep ensemble is a member; generalist and specialists together are one."""
    if isinstance(ensemble, DeepEnsemble):
        return of_networks(ensemble.networks)
    return Teacher(lambda raw: ensemble.probabilities(raw)[None], 1)


def of_networks(networks: Sequence[Classifier]) -> Teacher:
    """All members of all networks."""
    count = sum(network.num_members for network in networks)

    def answer(raw: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat(
                [member_log_probabilities(network.eval(), raw) for network in networks]
            ).exp()

    members = [_member(network, k) for network in networks for k in range(network.num_members)]
    return Teacher(answer, count, members)


def _member(network: nn.Module, k: int) -> Callable[[Tensor], Tensor]:
    def logits(raw: Tensor) -> Tensor:
        found = network(raw)
        return found[k] if found.dim() == 3 else found

    return logits


def check_members(name: str, student: Student, teacher_members: int, student_members: int) -> None:
    """Raises UserError where a student of several members has a teacher of another number of them."""
    if student_members > 1 and teacher_members != student_members:
        raise UserError(
            f"students.{name} has {student_members} members, its teacher {os.path.basename(student.teacher)} "
            f'{teacher_members}: member k learns from member k, so give it as many, or network = "single"'
        )


def perturbation(
    name: str, student: Student, teacher: Teacher, inputs: InputSpec
) -> Callable[[Tensor], Tensor]:
    """raw inputs -> raw inputs moved by `student.perturb`, which knows inputs in 0..1."""
    if inputs.dtype != "uint8":
        raise UserError(
            f"students.{name}.perturb moves pictures, uint8 scaled to 0..1; these are {inputs.dtype}"
        )
    if student.perturb != "gaussian" and not teacher.members:
        raise UserError(
            f'students.{name}.perturb = "{student.perturb}" follows the gradient of a network; generalist and '
            'specialists together are none: teacher = "generalist", or perturb = "gaussian"'
        )
    scale = inputs.scale
    networks = [lambda x, logits=logits: logits(x / scale) for logits in teacher.members]

    def move(raw: Tensor) -> Tensor:
        x = raw.float() * scale
        return (
            perturb(student.perturb, x, student.perturb_size, student.temperature, networks) / scale
        )

    return move
