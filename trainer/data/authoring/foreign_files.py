"""Files that people have and that no `shards` command reads: what makes them readable."""

from __future__ import annotations

from pathlib import Path

from pipeline.config import UserError

_TEXTS = "save it as a csv with the columns text and label: `referral shards table`"
_ARRAYS = "save its arrays as an npz with x and y: `referral shards arrays`"
# End of a file's name -> the remedy.
CONVERT = {
    ".parquet": "`referral shards parquet` makes shards of them",
    ".arrow": "save it as parquet: `referral shards parquet`",
    ".feather": "save it as parquet: `referral shards parquet`",
    ".json": _TEXTS,
    ".jsonl": _TEXTS,
    ".xlsx": _TEXTS,
    ".xls": _TEXTS,
    ".h5": _ARRAYS,
    ".hdf5": _ARRAYS,
    ".mat": _ARRAYS,
    ".pkl": _ARRAYS,
    ".pickle": _ARRAYS,
    ".pt": _ARRAYS,
    ".tfrecord": "write its examples to webdataset tars: `referral shards from-webdataset`",
    ".zip": "unpack it first",
    ".7z": "unpack it first",
    ".rar": "unpack it first",
}


def conversion(path: str | Path) -> str:
    """What makes the file readable here. "" where there is nothing to say."""
    name = Path(path).name.lower()
    return next((remedy for end, remedy in CONVERT.items() if name.endswith(end)), "")


def refuse_foreign(path: str | Path) -> None:
    """Raises UserError for a file that no `shards` command reads."""
    remedy = conversion(path)
    if remedy:
        kind = Path(path).suffix.lower()
        raise UserError(f"{path}: {kind} files are not read here; {remedy}")
