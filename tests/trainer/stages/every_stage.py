"""What is not done of the run at ROOT, one stage after the other, on the ranks of torchrun.

torchrun --nproc-per-node 2 tests/trainer/stages/every_stage.py ROOT
"""

import sys

from pipeline.graph import open_run
from trainer.distributed.ranks import process_group
from trainer.session import Session
from trainer.stages import run_together

if __name__ == "__main__":
    run = open_run(sys.argv[1])
    with process_group(run.config.engine) as ranks:
        session = Session(run, ranks)
        for stage in [stage for stage in run.stages if not stage.is_done]:
            run_together(session, [stage])
