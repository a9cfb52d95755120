"""Several networks, one distribution: eq. 5's settings, fitted on val, and the ensemble itself."""

from __future__ import annotations

from dataclasses import asdict
from functools import cache
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
from ensemble.gating import holders_of
from ensemble.lazy_specialists import BYTES_HELD, LazySpecialists, load_specialist
from ensemble.listed_ensemble import Wanted, rows_of_block
from ensemble.sharing import own_bytes
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

PUBLISHED = ("ensemble.json",)


def ensemble(session: Session, stage: Stage) -> None:
    """What eq. 5 needs beside the networks: temperatures, and the specialists' weight."""
    with session.attempt(stage, PUBLISHED) as attempt:
        settings = fit_ensemble_settings(session)
        save_settings(session, settings, attempt.directory)


def deep_ensemble(session: Session, stage: Stage) -> None:
    """The mean of the members. There is nothing to fit."""
    with session.attempt(stage, PUBLISHED) as attempt:
        config = session.config.ensemble
        settings = EnsembleSettings(kind="deep", members=config.num_networks)
        if config.mean_order != MEANS["arithmetic"]:
            settings.order = config.mean_order
        save_settings(session, settings, attempt.directory)


def shortlist_ensemble(session: Session, stage: Stage) -> None:
    """How long the shortlist is, and how the networks are joined on it, fitted on val.

    sizes.json has the same for the first 1, 2, ... networks, at the whole's length and order.
    """
    with session.attempt(stage, PUBLISHED) as attempt:
        by_size = fit_shortlist(session, networks_of_members(session))
        if session.ranks.is_main:
            write_json(attempt.path("sizes.json"), [asdict(each) for each in by_size])
        save_settings(session, by_size[-1], attempt.directory)


def save_settings(session: Session, settings: EnsembleSettings, directory: Path) -> None:
    if session.ranks.is_main:
        settings.save(directory)


def read_settings(session: Session) -> EnsembleSettings:
    """What the stage `ensemble` found."""
    return EnsembleSettings.load(session.run.ensemble.folder("ensemble.json"))


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
    """The ensembles of the first 1, 2, ... networks. The last one is the run's."""
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

    @cache  # what a DONE says is looked up once. What is read is compared each time
    def folder_of(m: int) -> Path:
        return stages[m].folder("model.json")

    def load_one(m: int) -> Specialist:
        try:
            return load_specialist(folder_of(m), generalist, (), device, builders)
        except ValueError as error:  # damaged, which is found when rows first need it
            raise UserError(str(error)) from None

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
    weights = [torch.tensor([1.0, *[w] * count], dtype=torch.float64) for w in WEIGHTS]

    def whole(batch: Batch) -> dict[str, Tensor]:
        join = joined.ask(batch.inputs)
        of_label = [join(each).gather(1, batch.labels[:, None])[:, 0] for each in weights]
        return {"losses": nll_of(of_label)}

    def listed(batch: Batch) -> dict[str, Tensor]:
        parts, start = [], 0
        for answers in joined.ask_in_blocks(batch.inputs, Wanted(0), batch.labels):
            end = start + len(answers.active)
            labels, start = batch.labels[start:end], end
            joins = [answers.join(each) for each in weights]
            parts.append(nll_of([q.at(q.values, labels) for q in joins]))
        return {"losses": torch.cat(parts)}

    ids, val = weight_ids(session), session.shards("val")
    if joined.is_sparse:
        measured = session.measured(val, listed, ids=ids, rows=rows_of_block(joined, 0))
    else:
        measured = session.measured(val, whole, ids=ids)
    losses = measured["losses"]
    weight = fit_weight_to_losses(losses)
    means = losses.mean(axis=0, dtype=np.float64)
    session.say(
        "eq. 5: the specialists' weight is %.3g (NLL on val %s)",
        weight,
        ", ".join(f"{w:g}: {loss:.4f}" for w, loss in zip(WEIGHTS, means, strict=True)),
    )
    return [1.0, *[weight] * count]


def nll_of(of_label: list[Tensor]) -> Tensor:
    """- log of probabilities [b] of the label, side by side."""
    return torch.stack([-p.clamp_min(1e-30).log() for p in of_label], dim=1)


def by_group(
    ensemble: SpecialistEnsemble, ids: np.ndarray, predicted: np.ndarray
) -> np.ndarray | None:
    """`ids`, those that need the same specialist together. None where all specialists are held.

    predicted: the generalist's class of each.  A specialist that cannot be kept is then read once
    for all its rows, and not once in every block.
    """
    if not ensemble.is_sparse or held_at_once(ensemble):
        return None
    holders = holders_of(ensemble.groups, torch.device("cpu"))[:, 0].numpy()
    return ids[np.argsort(holders[predicted], kind="stable")]


def held_at_once(ensemble: SpecialistEnsemble) -> bool:
    """Whether all specialists, each as large as the first, are within what is held of them."""
    specialists = ensemble.specialists
    if not isinstance(specialists, LazySpecialists) or not len(specialists):
        return True
    first = own_bytes(ensemble.generalist, specialists[next(iter(specialists))])
    return first * len(specialists) <= BYTES_HELD
