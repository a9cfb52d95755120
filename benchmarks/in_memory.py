"""Examples in memory where the stream expects a shard set: for measurements that are not of the data plane."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.config import Data

if TYPE_CHECKING:
    import numpy as np


class InMemory:
    """Inputs [n, ...] and labels [n], as a stream's shards."""

    class_names, damage, lost, data = (), (), 0, Data()

    def __init__(self, inputs: np.ndarray, labels: np.ndarray, split: str = "train"):
        self.rows, self.labels, self.split = inputs, labels, split
        self.input_shape, self.input_dtype = inputs.shape[1:], inputs.dtype

    def __len__(self) -> int:
        return len(self.labels)

    num_samples = property(__len__)

    def read_into(self, inputs, places, ids) -> dict:
        inputs[places] = self.rows[ids]
        return {}
