"""What a finished run says: results.json and report.html."""

_EXPORTS = {"collect": "results", "verdict": "results", "write_report": "page"}

__all__ = list(_EXPORTS)


def __getattr__(name):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
