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
from ..losses import TopAnswers
from ..run_directory import Attempt, read_json, write_json

KEPT = 32  # classes per stored answer

Teacher = Callable[[Batch], Tensor | TopAnswers]


def live_teacher(ensemble) -> Teacher:
    """Ask generalist and specialists anew for every batch."""
    return lambda batch: ensemble.probabilities(batch.inputs)


def store_answers(session, ensemble, attempt: Attempt) -> None:
    """answers/SPLIT/{indices,values}.npy for train and transfer: [N, k] int32 classes and float32 probabilities."""
    k = min(KEPT, session.num_classes)

    def ask(batch: Batch):
        top = ensemble.probabilities(batch.inputs).topk(k, dim=1)
        return {"indices": top.indices.int(), "values": top.values.float()}

    for split in ("train", "transfer") if session.config.data.transfer else ("train",):
        shards = session.shards(split)
        found = session.measured(shards, ask)
        if not session.ranks.is_main:
            continue
        for name in ("indices", "values"):
            # Damaged examples get no answer, and no stream delivers them.
            answers = np.zeros((len(shards), k), found[name].dtype)
            answers[found["ids"]] = found[name]
            np.save(attempt.path(f"answers/{split}/{name}.npy"), answers, allow_pickle=False)
        tail = 1 - found["values"].sum(1, dtype=np.float64)
        write_json(attempt.path(f"answers/{split}/answers.json"), {
            "schema": 1, "num_classes": session.num_classes, "k": k, "samples": len(tail),
            "fingerprint": shards.fingerprint, "mean_tail": float(tail.mean()), "max_tail": float(tail.max()),
        })  # fmt: skip
        session.say("stored the ensemble's answers on %s: top %d of %d classes, mean mass left out %.2g", split, k,
                    session.num_classes, float(tail.mean()))  # fmt: skip


def stored_teacher(directory: Path, sources, num_classes: int) -> Teacher:
    """The stored answers to the inputs of a stream's `sources`."""
    answers = []
    for source in sources:
        place, facts = directory / source.shards.split, read_json(directory / source.shards.split / "answers.json")
        assert (facts["fingerprint"], facts["num_classes"]) == (source.shards.fingerprint, num_classes), place
        files = [place / "indices.npy", place / "values.npy"]
        answers.append([np.load(file, mmap_mode="r", allow_pickle=False) for file in files])

    def teacher(batch: Batch) -> TopAnswers:
        ids, origin = batch.ids.cpu().numpy(), batch.source.cpu().numpy()
        indices, values = (np.empty((len(ids), part.shape[1]), part.dtype) for part in answers[0])
        for number, (stored_indices, stored_values) in enumerate(answers):
            rows = np.flatnonzero(origin == number)
            indices[rows], values[rows] = stored_indices[ids[rows]], stored_values[ids[rows]]
        device = batch.labels.device
        return TopAnswers(torch.from_numpy(indices).to(device).long(), torch.from_numpy(values).to(device), num_classes)

    return teacher
