"""From files to batches: shards and their manifest, exact streams, routed shards.

Imports lazily: `import trainer.data` alone loads nothing heavy.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .cache import cached
    from .orders import balanced, shuffled
    from .routing import open_routed, route
    from .shards import ShardSet, open_shards
    from .streams import Batch, MeasuringStream, Source, TrainingStream
    from .writing import ShardWriter, write_manifest

_HOMES = {
    "ShardWriter": "writing",
    "write_manifest": "writing",
    "ShardSet": "shards",
    "open_shards": "shards",
    "cached": "cache",
    "Batch": "streams",
    "Source": "streams",
    "TrainingStream": "streams",
    "MeasuringStream": "streams",
    "shuffled": "orders",
    "balanced": "orders",
    "route": "routing",
    "open_routed": "routing",
}
__all__ = [
    "Batch",
    "MeasuringStream",
    "ShardSet",
    "ShardWriter",
    "Source",
    "TrainingStream",
    "balanced",
    "cached",
    "open_routed",
    "open_shards",
    "route",
    "shuffled",
    "write_manifest",
]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
