"""Each run's stages that are not done, up to one that has a job of one rank, on torchrun's ranks.

torchrun --nproc-per-node 2 tests/trainer/stages/every_stage.py ROOT ...
"""

import sys

from pipeline.graph import open_run
from trainer.distributed.ranks import process_group
from trainer.session import Session
from trainer.stages import run_stage


def shares_ranks(stage) -> bool:
    return stage.kind.scales or bool(stage.kind.job)


if __name__ == "__main__":
    runs = [open_run(root) for root in sys.argv[1:]]
    with process_group(runs[0].config.engine) as ranks:
        for run in runs:
            session = Session(run, ranks)
            for stage in run.stages:
                if not shares_ranks(stage):
                    break
                run_stage(session, stage)
