"""Teachers: functions from a batch to probabilities [B, C].

Where every example is always seen in the same view (data.augment = "none") a teacher is asked once and its answers are
kept: the k most probable classes and the mass of the rest, which is spread evenly over the other classes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..data.streams import Batch
from ..run_directory import Attempt, read_json, write_json

KEPT = 32  # classes per stored answer

Teacher = Callable[[Batch], Tensor]


def live_teacher(ensemble) -> Teacher:
    """Ask generalist and specialists anew for every batch."""
    return lambda batch: ensemble.probabilities(batch.inputs)


def store_answers(session, ensemble, attempt: Attempt) -> None:
    """answers/{indices,values}.npy for the training split: [N, k] int32 classes and float32 probabilities."""
    shards = session.shards("train")
    k = min(KEPT, session.num_classes)

    def ask(batch: Batch):
        top = ensemble.probabilities(batch.inputs).topk(k, dim=1)
        return {"indices": top.indices.int(), "values": top.values.float()}

    found = session.measured(shards, ask)
    if session.ranks.is_main:
        for name in ("indices", "values"):
            np.save(attempt.path(f"answers/{name}.npy"), found[name], allow_pickle=False)
        kept = found["values"].sum(1, dtype=np.float64)
        write_json(attempt.path("answers/answers.json"), {
            "schema": 1, "num_classes": session.num_classes, "k": k, "samples": len(kept),
            "fingerprint": shards.fingerprint, "mean_tail": float((1 - kept).mean()), "max_tail": float((1 - kept).max()),
        })  # fmt: skip
        session.say("stored the ensemble's answers: top %d of %d classes, mean mass left out %.2g", k,
                    session.num_classes, float((1 - kept).mean()))  # fmt: skip


def stored_teacher(directory: Path, num_classes: int) -> Teacher:
    """The stored answers as probabilities; the tail's mass is even over the classes that were not kept."""
    assert read_json(directory / "answers.json")["num_classes"] == num_classes
    indices = np.load(directory / "indices.npy", mmap_mode="r", allow_pickle=False)
    values = np.load(directory / "values.npy", mmap_mode="r", allow_pickle=False)

    def teacher(batch: Batch) -> Tensor:
        ids = batch.ids.cpu().numpy()
        device = batch.labels.device
        return spread(torch.from_numpy(indices[ids]).to(device).long(), torch.from_numpy(values[ids]).to(device), num_classes)

    return teacher


def spread(indices: Tensor, values: Tensor, num_classes: int) -> Tensor:
    """[B, C] probabilities from the top k: indices, values [B, k]; what is missing to 1 is spread over the C - k others."""
    tail = (1 - values.sum(1, keepdim=True)).clamp_min(0)
    others = num_classes - indices.shape[1]
    if others == 0:
        return torch.zeros(len(indices), num_classes, device=values.device).scatter_(1, indices, values)
    return (tail / others).expand(-1, num_classes).scatter(1, indices, values)
