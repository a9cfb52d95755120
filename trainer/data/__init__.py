"""From files to batches: shards and their manifest, exact streams, routed shards.  Imports lazily."""

from importlib import import_module

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
    "shuffled": "streams",
    "balanced": "streams",
    "route": "routing",
    "open_routed": "routing",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
