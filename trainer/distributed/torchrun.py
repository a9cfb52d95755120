"""torchrun for the trainer, with two promises that torchrun itself does not make.

    python -m trainer.distributed.torchrun [torchrun's options] -- STAGE --run DIR ...

Its exit code is that of the rank that failed first (torchrun's is always 1), so that 2, the user's mistake, and 75,
start me again, reach the runner.  And the ranks die with this process, from their first instant.
"""

import os
import signal
import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import get_args_parser, run

TETHER = Path(__file__).with_name("die_with_parent.py")


def main(arguments: list[str]) -> int:
    """Start the ranks and wait for them; `arguments` are torchrun's options, then the trainer's own."""
    # With the shared store of torch 2.13 half of the elastic restarts (--max-restarts) hang or fail.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    # Slurm sends it to every process of a step; it is for the ranks, which do not inherit this handler.
    signal.signal(signal.SIGUSR2, lambda *_: None)
    first = next((index for index, word in enumerate(arguments) if word == "--"), None)
    assert first is not None, "write -- between torchrun's options and the trainer's"
    # torchrun's parser would take the trainer's --run for an abbreviation of its own --run-path; it never sees it.
    options = get_args_parser().parse_args([*arguments[:first], "--no-python", sys.executable])
    tether = ["-I", str(TETHER), str(os.getpid())]
    options.training_script_args = [
        *tether,
        sys.executable,
        "-m",
        "trainer",
        *arguments[first + 1 :],
    ]
    try:
        run(options)
    except ChildFailedError as mistake:
        code = mistake.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code
    except SignalException as received:
        return 128 + received.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
