"""Stages of a run, one after the other in this process."""

from pipeline.config import save_config
from pipeline.graph import RunDirectory
from trainer.distributed.ranks import process_group
from trainer.session import Session
from trainer.stages import run_stage


def run_all(root, config, only=None):
    root.mkdir(parents=True, exist_ok=True)
    save_config(config, root / "config.toml")
    run = RunDirectory(root, config)
    with process_group(config.engine) as ranks:
        session = Session(run, ranks)
        for stage in run.stages:
            if not stage.is_done and (only is None or stage.name in only):
                run_stage(session, stage)
    return run
