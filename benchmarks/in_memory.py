"""Examples in memory where a stream expects a shard set: to measure what is not the data plane."""

from __future__ import annotations

import numpy as np

from pipeline.config import Data
from trainer.data.shards import Ids, ShardSet


class InMemory(ShardSet):
    """Decoded inputs [n, ...] and labels int64 [n] as a stream's shards."""

    def __init__(self, inputs: np.ndarray, labels: np.ndarray, split: str = "train"):
        self.rows = inputs
        self.labels = labels
        self.split = split
        self.data = Data()
        self.class_names = []
        self.corruption = []
        self._forget_open()
        self._first = inputs.shape[1:], inputs.dtype

    def read_into(self, inputs: np.ndarray, rows: np.ndarray, ids: Ids) -> dict[int, str]:
        """See ShardSet. Nothing is unreadable."""
        inputs[rows] = self.rows[ids]
        return {}
