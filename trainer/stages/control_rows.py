"""Controls of other networks: the generalist trained on, a wider one, two averaged, and two on a
shortlist.

pipeline.choices.CONTROL_ROWS names them.  The second generalist is a stage of its own.
"""

from __future__ import annotations

import torch

from ensemble import (
    DeepEnsemble,
    EnsembleSettings,
    ShortlistEnsemble,
    SpecialistEnsemble,
)
from networks import (
    ModelSpec,
    build_classifier,
    count_multiplications,
    multiplications,
    widened_to,
)
from pipeline.config import UserError
from pipeline.store import Stage

from ..data.streams import Batch
from ..session import Session
from .calibrate import calibration_ids
from .control import never
from .joining import load_ensemble, save_settings
from .networks import builders_of, fresh_network, load_network, read_summary, save_network
from .shortlist import fit_shortlist
from .sizes import times_asked
from .training import count_steps, generalist_task, open_layers, train_network
from .validate import validate_calibrated, validate_classifier

PAIR = 2  # generalists
VALIDATIONS = 10  # of the generalist that trains on, where [train] does not say how many


def train_on(session: Session, stage: Stage, name: str) -> None:
    """The generalist for as long again, by [train] from its start, on a new order of examples.

    It keeps its best step on val, the start among the candidates, as the other controls do that
    train the generalist on.
    """
    seed = session.seed("control train_on", 0)
    with session.attempt(stage) as attempt:
        steps = steps_again(session)
        train = session.config.train
        every = train.validate_every or max(1, steps // VALIDATIONS)
        kept = {"validate_every": every, "patience": train.patience or never(steps)}
        schedule = train.model_copy(update=kept)
        network = load_network(session, session.run.generalist)
        if session.config.generalist.init:
            open_layers(network, train, "train")
        validate = validate_calibrated(session)
        task = generalist_task(session, network, schedule, validate, seed, steps)
        trained, summary = train_network(session, attempt, task)
        save_network(session, attempt, trained, summary)
        if summary["best_step"] == 0:
            session.say("%s: no step was better on val than the generalist, which it stays", name)


def steps_again(session: Session) -> int:
    """Steps as many as the generalist took, or as [train] says where it was given."""
    taken = read_summary(session.run.generalist).get("steps")
    return taken or count_steps(session.config.train, session.shards("train").num_samples)


def wider(session: Session, stage: Stage, name: str) -> None:
    """A generalist that multiplies as much for an example as the ensemble does, from scratch."""
    seed = session.seed("control wider", 0)
    with session.attempt(stage) as attempt:
        spec = wider_spec(session)
        torch.manual_seed(seed)
        network = build_classifier(spec, builders_of(session.config)).to(session.ranks.device)
        validate = validate_classifier(session)
        task = generalist_task(session, network, session.config.train, validate, seed)
        trained, summary = train_network(session, attempt, task)
        save_network(session, attempt, trained, summary)


def wider_spec(session: Session) -> ModelSpec:
    """The spec of controls.model, or the generalist's own with wider layers."""
    if session.config.controls.model:
        return fresh_network(session, own_model=session.config.controls.model).spec
    own = load_network(session, session.run.generalist)
    target = ensemble_multiplications(session)
    whose = "the ensemble's"
    if not session.run.method.joined():  # the ensemble is the generalist itself
        target = PAIR * multiplications(own, own.zero_input())
        whose = "of two generalists"
    spec = widened(session, own.spec, target)
    counted = count_multiplications(spec, builders_of(session.config))
    session.say(
        "wider: %s multiplications an example, %s %s: %s",
        f"{counted:,}",
        whose,
        f"{round(target):,}",
        ", ".join(f"{key} {value}" for key, value in spec.options.items()),
    )
    return spec


def widened(session: Session, spec: ModelSpec, target: float) -> ModelSpec:
    """`spec` with as many multiplications as `target`.

    Raises UserError for a network that has no width.
    """
    try:
        return scaled_to(session, spec, target)
    except ValueError as error:
        raise UserError(
            f'controls.rows: "wider": {error}; name another network in controls.model, '
            'as { name = "..." } or { options = { ... } }'
        ) from None


def scaled_to(session: Session, spec: ModelSpec, target: float) -> ModelSpec:
    """Like `widened`, but raises ValueError for a network that has no width."""
    builders = builders_of(session.config)
    return widened_to(spec, target, lambda each: count_multiplications(each, builders))


def ensemble_multiplications(session: Session) -> float:
    """The ensemble's for one example on average. How many specialists it asks is from val."""
    ensemble = load_ensemble(session)
    if not isinstance(ensemble, SpecialistEnsemble):
        return ensemble.multiplications()

    def measure(batch: Batch) -> dict[str, torch.Tensor]:
        return {"asked": ensemble.asked(ensemble.gated(batch.inputs))}

    ids = calibration_ids(session)
    asked = session.measured(session.shards("val"), measure, ids=ids)["asked"]
    times = times_asked(asked, len(ensemble.available))
    return ensemble.mean_multiplications(times, len(asked))


def average(session: Session, stage: Stage, name: str) -> None:
    """The arithmetic mean of the generalist and a second one. There is nothing to fit."""
    with session.attempt(stage) as attempt:
        save_settings(session, EnsembleSettings(kind="deep", members=PAIR), attempt.directory)


def shortlist(session: Session, stage: Stage, name: str) -> None:
    """How long the shortlist is and how the two are joined on it, fitted on val."""
    with session.attempt(stage) as attempt:
        networks = [load_network(session, each) for each in stage.inputs]
        settings = fit_shortlist(session, networks)[-1]
        save_settings(session, settings, attempt.directory)


def load_pair(session: Session, stage: Stage) -> DeepEnsemble | ShortlistEnsemble | None:
    """The two generalists as their stage joins them. None of a control that is one network."""
    if not stage.path("ensemble.json").exists():
        return None
    settings = EnsembleSettings.load(stage.folder("ensemble.json"))
    networks = [load_network(session, each) for each in stage.inputs]
    if settings.kind == "deep":
        return DeepEnsemble(networks)
    assert settings.shortlist is not None and settings.order is not None
    return ShortlistEnsemble(
        networks, settings.shortlist, settings.order, settings.weights, settings.temperatures
    )
