"""An augmentation that leaves the pictures as they are, and is slow or fails as it is told.

Files in $REFERRAL_FAULTS tell it:
nap            while it exists every batch takes half a second: time enough to do something to a job
fail-ELEMENT   so many times (a number, in the file) that element of an array fails
"""

import os
import time
from pathlib import Path

import numpy as np


def leave(inputs: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    faults = Path(os.environ["REFERRAL_FAULTS"])
    failing = faults / f"fail-{os.environ.get('SLURM_ARRAY_TASK_ID')}"
    if failing.exists():
        left = int(failing.read_text())
        failing.unlink() if left == 1 else failing.write_text(str(left - 1))
        raise RuntimeError("this GPU has fallen off the bus")
    if (faults / "nap").exists():
        time.sleep(0.5)
    return inputs


leave.numbers = 1
