"""Two ranks, one of which receives a signal at step 3: both must stop at the same step.

stops.py OUT    writes OUT/RANK, the step at which that rank stopped
"""

import os
import signal
import sys
import time
from pathlib import Path

from pipeline.config import Engine
from trainer.distributed.ranks import StopSignal, process_group

with process_group(Engine(device="cpu")) as ranks:
    stop = StopSignal()
    for step in range(1, 20):
        if step == 3 and ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGUSR2)
        if step == 2 and ranks.rank == 0:
            time.sleep(0.5)  # one rank is ahead of the other
        if stop.agreed(ranks):
            break
    stop.close()
    Path(sys.argv[1], str(ranks.rank)).write_text(str(step))
