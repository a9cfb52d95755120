"""Stored answers: per sample (and view) the teacher's k largest log-probabilities and the mass of the rest.

A teacher that always sees an input alike is asked once.  What is kept is a few hundred bytes a sample whatever the
number of classes; the rest's mass is taken to be even over the other classes, at any temperature.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.store import Attempt, read_json, write_json

from ..core.distillation import TopKTargets
from ..core.probabilities import safe_log, soften
from ..data.augment import Views, find_augment
from ..data.streams import Batch
from ..session import Session

KEPT = 32  # classes per stored answer
FAR = 0.1  # nats: what is kept is no longer what the teacher says
SCHEMA = 2
FILES = ("indices", "log_values", "log_tail")


def views_of(session: Session, count: int | None) -> Views | None:
    return None if count is None else Views(count, session.seed("views", 0))


def compress(probabilities: Tensor, k: int) -> dict[str, Tensor]:
    """[K, B, C] -> {indices int32 [B, K, k], log_values float16 [B, K, k], log_tail float16 [B, K]}."""
    kept = TopKTargets.of(safe_log(probabilities).transpose(0, 1), k)
    return {
        "indices": kept.indices.int(),
        "log_values": kept.log_values.half(),
        "log_tail": kept.log_tail.half(),
    }


def decompress(indices, log_values, log_tail, num_classes: int, device) -> TopKTargets:
    """Stored rows [B, K, ...] -> TopKTargets [K, B, ...], normalised: float16 rounds logarithms by 5e-4 of them."""
    stored = (
        torch.from_numpy(np.ascontiguousarray(part)) for part in (indices, log_values, log_tail)
    )
    indices, log_values, log_tail = (part.to(device).transpose(0, 1) for part in stored)
    log_values, log_tail = log_values.float(), log_tail.float()
    total = torch.cat([log_values, log_tail[..., None]], -1).logsumexp(-1)
    return TopKTargets(indices.long(), log_values - total[..., None], log_tail - total, num_classes)


def store_targets(
    session: Session, teacher, attempt: Attempt, augment: str, views: Views | None, temperatures
) -> None:
    """SPLIT/{indices,log_values,log_tail}.npy for train and transfer, [N * views, K, ...]: row id * views + view.

    answers.json says of what: the shards' fingerprint, the views' seed, and what was lost by keeping k classes: the
    mean KL(answer || what is kept of it), nats, at each of `temperatures`.
    """
    augmentation = find_augment(augment)
    for number, split in enumerate(
        ("train", "transfer") if session.config.data.transfer else ("train",)
    ):
        shards = session.shards(split)
        parts = []
        for view in range(views.count if views else 1):

            def ask(batch: Batch, view=view, number=number):
                raw = batch.inputs
                if augmentation is not None:
                    ids = batch.ids.cpu().numpy()
                    uniforms = views.uniforms(
                        number, ids, np.full_like(ids, view), augmentation.numbers
                    )
                    raw = torch.from_numpy(augmentation(raw.cpu().numpy(), uniforms)).to(raw.device)
                answered = teacher.answer(raw)
                found = compress(answered, KEPT)
                kept = decompress(
                    *(found[name].cpu().numpy() for name in FILES), session.num_classes, raw.device
                )
                lost = [_kl(soften(answered, T), soften(kept.spread(), T)) for T in temperatures]
                return found | {"lost": torch.stack(lost, 1)}

            parts.append(session.measured(shards, ask))
        if session.ranks.is_main:
            _write(session, attempt, split, parts, augment, views, temperatures)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """[K, B, C] twice -> KL(p || q), mean over K: [B]."""
    tiny = torch.finfo(q.dtype).tiny
    return (torch.special.xlogy(p, p) - p * q.clamp_min(tiny).log()).sum(-1).mean(0)


def _write(
    session: Session, attempt: Attempt, split: str, parts: list[dict], augment, views, temperatures
) -> None:
    shards, count = session.shards(split), len(parts)
    size = 0
    for name in FILES:
        first = parts[0][name]
        dtype = (
            first.dtype
            if name != "indices"
            else np.uint16
            if session.num_classes <= 2**16
            else np.int32
        )
        answers = np.zeros(
            (len(shards), count, *first.shape[1:]), dtype
        )  # damaged samples stay 0: no stream has them
        for view, part in enumerate(parts):
            answers[part["ids"], view] = part[name]
        size += answers.nbytes
        np.save(
            attempt.path(f"{split}/{name}.npy"),
            answers.reshape(-1, *first.shape[1:]),
            allow_pickle=False,
        )
    tails = np.exp(np.concatenate([part["log_tail"] for part in parts]).astype(np.float64))
    lost = np.concatenate([part["lost"] for part in parts]).mean(0, dtype=np.float64)
    facts = {
        "schema": SCHEMA,
        "num_classes": session.num_classes,
        "members": parts[0]["indices"].shape[1],
        "k": parts[0]["indices"].shape[2],
        "samples": len(parts[0]["ids"]),
        "fingerprint": shards.fingerprint,
        "augment": augment,
        "views": views.count if views else None,
        "views_seed": views.seed if views else None,
        "mean_tail": float(tails.mean()),
        "max_tail": float(tails.max()),
        "bytes_per_sample": size / len(shards),
        "truncation_kl": {
            f"{T:g}": float(value) for T, value in zip(temperatures, lost, strict=True)
        },
    }
    write_json(attempt.path(f"{split}/answers.json"), facts)
    said = ", ".join(f"{value:.2g} at T = {T}" for T, value in facts["truncation_kl"].items())
    session.say(
        "stored answers on %s: top %d of %d classes, %.0f bytes a sample, mean mass left out %.2g; KL from the "
        "whole answer %s",
        split,
        facts["k"],
        session.num_classes,
        facts["bytes_per_sample"],
        facts["mean_tail"],
        said,
    )
    for line in warnings(facts):
        session.say("%s", line)


def warnings(facts: dict) -> list[str]:
    """A line for each temperature, as answers.json has them, at which what is kept is FAR from the whole answer.

    A temperature lifts what is rare: an even tail of 1e-3 over 3,000 classes holds .63 of all at T = 2.
    """
    return [
        f"warning: at T = {T} what is kept of the {facts['num_classes']:,} classes is {lost:.2g} nats from what the "
        "teacher says; let students learn at temperature 1, where the tail keeps its mass"
        for T, lost in facts["truncation_kl"].items()
        if lost > FAR and T != "1"
    ]


def stored_targets(directory: Path, session: Session, sources, views: Views | None):
    """batch -> TopKTargets [K, b, k]: the stored answers to the inputs of a stream's `sources`."""
    held = []
    for source in sources:
        place = directory / source.shards.split
        facts = read_json(place / "answers.json")
        expected = (
            source.shards.fingerprint,
            session.num_classes,
            views.count if views else None,
            views.seed if views else None,
        )
        found = (facts["fingerprint"], facts["num_classes"], facts["views"], facts["views_seed"])
        assert found == expected, f"{place}: answers of {found}, {expected} asked"
        held.append(
            [np.load(place / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in FILES]
        )
    count = views.count if views else 1

    def answers(batch: Batch) -> TopKTargets:
        rows, origin = (batch.ids * count + batch.view).cpu().numpy(), batch.source.cpu().numpy()
        parts = [np.empty((len(rows), *part.shape[1:]), part.dtype) for part in held[0]]
        for number, files in enumerate(held):
            here = np.flatnonzero(origin == number)
            for part, file in zip(parts, files, strict=True):
                part[here] = file[rows[here]]
        parts[0] = parts[0].astype(np.int64)
        return decompress(*parts, session.num_classes, batch.labels.device)

    return answers
