"""Stages whose files a test has changed, as if they had been made so."""

from networks import checksums
from pipeline.store import Stage, read_json, write_json


def altered(*stages: Stage) -> None:
    """Write what DONE says of the stages' files anew."""
    for stage in stages:
        done = read_json(stage.directory / "DONE")
        attempt = stage.directory / "attempts" / done["attempt"]
        known = {name for name in done["files"] if (attempt / name).exists()}
        files = checksums.entries_of(attempt, known.__contains__)
        (stage.directory / "DONE").unlink()
        write_json(stage.directory / "DONE", done | {"files": files})
        write_json(attempt / "DONE", done | {"files": files})
