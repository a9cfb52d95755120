"""Several networks, one distribution: eq. 5's settings, fitted on val, and the ensemble itself."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ensemble import (
    DeepEnsemble,
    EnsembleSettings,
    ShortlistEnsemble,
    SpecialistEnsemble,
)
from ensemble.fitting import WEIGHTS, fit_weight_to_losses
from ensemble.lazy_specialists import LazySpecialists, load_specialist
from ensemble.specialist_ensemble import Specialist
from networks import Classifier, ModelSpec
from pipeline.choices import MEANS
from pipeline.config import UserError
from pipeline.store import Stage, read_json, write_json

from ..data.streams import Batch
from ..session import Session
from .calibrate import weight_ids
from .grouping import groups_of, skipped_groups
from .networks import builders_of, load_network, read_summary
from .shortlist import fit_shortlist


def ensemble(session: Session, stage: Stage) -> None:
    """What eq. 5 needs beside the networks: temperatures, and the specialists' weight."""
    with session.attempt(stage) as attempt:
        settings = fit_ensemble_settings(session)
        save_settings(session, settings, attempt.directory)
    save_settings(session, settings, session.run.root)


def deep_ensemble(session: Session, stage: Stage) -> None:
    """The mean of the members; there is nothing to fit."""
    with session.attempt(stage) as attempt:
        config = session.config.ensemble
        settings = EnsembleSettings(kind="deep", members=config.num_networks)
        if config.mean_order != MEANS["arithmetic"]:
            settings.order = config.mean_order
        save_settings(session, settings, attempt.directory)
    save_settings(session, settings, session.run.root)


def shortlist_ensemble(session: Session, stage: Stage) -> None:
    """How long the shortlist is, and how the networks are joined on it, fitted on val.

    sizes.json has the same for the first 1, 2, ... networks, at the whole's length and order.
    """
    with session.attempt(stage) as attempt:
        by_size = fit_shortlist(session, networks_of_members(session))
        if session.ranks.is_main:
            write_json(attempt.path("sizes.json"), [asdict(each) for each in by_size])
        save_settings(session, by_size[-1], attempt.directory)
    save_settings(session, by_size[-1], session.run.root)


def save_settings(session: Session, settings: EnsembleSettings, directory: Path) -> None:
    if session.ranks.is_main:
        settings.save(directory)


def read_settings(session: Session) -> EnsembleSettings:
    """What the stage `ensemble` found."""
    return EnsembleSettings.load(session.run.ensemble.path("ensemble.json").parent)


def fit_ensemble_settings(session: Session) -> EnsembleSettings:
    """Raises UserError if specialists are missing that may not be."""
    config = session.config.ensemble
    missing = [m for m, each in enumerate(session.run.specialists) if not each.is_done]
    if missing and not config.allow_missing:
        raise UserError(
            f"specialists {missing} are missing; "
            "`referral retry`, or set ensemble.allow_missing = true"
        )
    dropped = dropped_specialists(session)
    say_dropped(session, dropped)
    settings = EnsembleSettings(
        gate=config.gate,
        max_specialists=config.max_specialists,
        combine=config.combine,
        shortlist=config.shortlist,
        skipped=sorted({*skipped_groups(session), *dropped}),
        missing=missing,
    )
    if config.temperatures:
        settings.temperatures = fitted_temperatures(session)
    if config.fit_weight:
        settings.weights = fit_weight(session, specialist_ensemble(session, settings))
    return settings


def dropped_specialists(session: Session) -> list[int]:
    """Groups whose specialist was never better on val than the generalist: it stays out.

    Where it is validated at its start, as one with patience is, its best step is then 0.  One that
    starts as another generalist is a second opinion even so.
    """
    if session.config.specialists.starts_elsewhere:
        return []
    trained = {m: stage for m, stage in enumerate(session.run.specialists) if stage.kind.trains}
    done = {m: stage for m, stage in trained.items() if stage.done() is not None}
    return [m for m, stage in done.items() if read_summary(stage).get("best_step") == 0]


def say_dropped(session: Session, dropped: list[int]) -> None:
    if dropped:
        session.say(
            "%d of %d specialists were never better on val than the generalist, and stay out of "
            "the ensemble: %s",
            len(dropped),
            len(session.run.specialists),
            ", ".join(map(str, dropped)),
        )


def fitted_temperatures(session: Session) -> list[float]:
    """[1 + M]: 1 for the generalist, and each specialist's, fitted on val when it was trained."""
    temperatures = [1.0]
    for stage in session.run.specialists:
        summary = read_summary(stage) if stage.is_done else {}
        temperatures.append(summary.get("temperature", 1.0))
    return temperatures


def load_ensemble(session: Session) -> SpecialistEnsemble | DeepEnsemble | ShortlistEnsemble:
    """The run's networks, joined as ensemble.json says."""
    settings = read_settings(session)
    if settings.kind == "shortlist":
        return load_shortlist_ensembles(session)[-1]
    if settings.kind == "deep":
        return load_deep_ensemble(session)
    return specialist_ensemble(session, settings)


def networks_of_members(session: Session) -> list[Classifier]:
    """The generalist and the further networks that join it."""
    stages = [session.run.generalist, *session.run.members]
    return [load_network(session, stage) for stage in stages]


def load_deep_ensemble(session: Session) -> DeepEnsemble:
    return DeepEnsemble(networks_of_members(session), session.config.ensemble.mean_order)


def load_shortlist_ensembles(session: Session) -> list[ShortlistEnsemble]:
    """The ensembles of the first 1, 2, ... networks; the last one is the run's."""
    networks = networks_of_members(session)
    by_size = read_json(session.run.ensemble.path("sizes.json"))
    ensembles = []
    for size, content in enumerate(by_size, 1):
        keys = ("shortlist", "order", "weights", "temperatures")
        ensembles.append(ShortlistEnsemble(networks[:size], **{key: content[key] for key in keys}))
    return ensembles


def specialist_ensemble(
    session: Session, settings: EnsembleSettings | None = None
) -> SpecialistEnsemble:
    """Generalist and specialists.  settings: of ensemble.json, if that is not written yet.

    A specialist is read when a row first needs it, and so many are held as
    `lazy_specialists.BYTES_HELD` says.
    """
    if settings is None:
        settings = read_settings(session)
    absent = {*settings.skipped, *settings.missing}
    stages = {m: each for m, each in enumerate(session.run.specialists) if m not in absent}
    generalist = load_network(session, session.run.generalist)
    device, builders = session.ranks.device, builders_of(session.config)

    def folder_of(m: int) -> Path:
        return stages[m].path("model.safetensors").parent

    def load_one(m: int) -> Specialist:
        return load_specialist(folder_of(m), generalist, (), device, builders)

    ensemble = SpecialistEnsemble(
        generalist,
        LazySpecialists(load_one, stages, generalist=generalist),
        groups_of(session),
        gate=settings.gate,
        max_specialists=settings.max_specialists,
        combine=settings.combine,
        temperatures=settings.temperatures,
        weights=settings.weights,
        skipped=settings.skipped,
        allow_missing=bool(settings.missing),
        shortlist=settings.shortlist,
    )
    for m in list(stages)[:1]:
        ensemble.learn_cut(ModelSpec.load(folder_of(m) / "model.json"))
    return ensemble


def fit_weight(session: Session, joined: SpecialistEnsemble) -> list[float]:
    """[1 + M]: 1 for the generalist and one weight for all specialists in eq. 5.

    It minimises the NLL on val.  The specialists start from the generalist and then
    learn more about their classes: their predictions differ from it where they know better, so
    that counting both alike may count the generalist too much.
    """
    count = len(joined.groups.members)

    def measure(batch: Batch) -> dict[str, Tensor]:
        join = joined.ask(batch.inputs)
        losses = []
        for weight in WEIGHTS:
            q = join(torch.tensor([1.0, *[weight] * count], dtype=torch.float64))
            losses.append(-q.gather(1, batch.labels[:, None])[:, 0].clamp_min(1e-30).log())
        return {"losses": torch.stack(losses, dim=1)}

    losses = session.measured(session.shards("val"), measure, ids=weight_ids(session))["losses"]
    weight = fit_weight_to_losses(losses)
    means = losses.mean(axis=0, dtype=np.float64)
    session.say(
        "eq. 5: the specialists' weight is %.3g (NLL on val %s)",
        weight,
        ", ".join(f"{w:g}: {loss:.4f}" for w, loss in zip(WEIGHTS, means, strict=True)),
    )
    return [1.0, *[weight] * count]
