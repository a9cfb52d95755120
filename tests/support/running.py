"""Stages of a run, one after the other in this process."""

from pipeline.config import save_config
from pipeline.graph import RunDirectory
from trainer.distributed.ranks import process_group
from trainer.session import Session
from trainer.stages.story import STAGES


def run_all(root, config, only=None):
    root.mkdir(parents=True, exist_ok=True)
    save_config(config, root / "config.toml")
    run = RunDirectory(root, config)
    with process_group(config.engine) as ranks:
        session = Session(run, ranks)
        for stage in run.stages:
            if not stage.is_done and (only is None or stage.name in only):
                STAGES[stage.name](session, stage, *arguments(run, stage))
    return run


def arguments(run, stage):
    """What a stage's function takes beside session and stage."""
    if stage.name in ("specialist", "member"):
        return (int(stage.directory.name),)
    return (stage.directory.name,) if stage.name in ("control", "student", "answers") else ()
