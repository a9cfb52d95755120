"""torchrun for the trainer, with two promises that torchrun itself does not make.

    python -P -m trainer.distributed.torchrun [torchrun's options] -- STAGE --run DIR ...

Its exit code is that of the rank that failed first (torchrun's is always 1).  So 2, the user's
mistake, and 75, start me again, reach the runner.  And the ranks die with this process, from their
first instant.
"""

from __future__ import annotations

import os
import signal
import sys
from argparse import ArgumentParser
from pathlib import Path

from pipeline.failures import answer

TIMEOUT = "--shutdown-timeout"
DIE_WITH_PARENT = Path(__file__).with_name("die_with_parent.py")


def main(arguments: list[str]) -> int:
    """Start the ranks and wait for them. `arguments` are torchrun's options, then the trainer's."""
    # Its own handlers answer the signals: they end the ranks first.
    return answer(lambda: start(arguments), signals=())


def start(arguments: list[str]) -> int:
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, run

    # With torch 2.13's shared store half of the elastic restarts (--max-restarts) hang or fail.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    # Slurm sends it to every process of a step. It is for the ranks, which do not inherit this
    # handler.
    signal.signal(signal.SIGUSR2, lambda *_: None)
    assert "--" in arguments, "write -- between torchrun's options and the trainer's"
    separator = arguments.index("--")
    # torchrun's parser would take the trainer's --run for an abbreviation of its own --run-path. It
    # never sees it.
    parser = get_args_parser()
    own = known_to(parser, arguments[:separator])
    options = parser.parse_args([*own, "--no-python", sys.executable])
    # -P: the working directory's own trainer.py is not ours.
    trainer = [sys.executable, "-P", "-m", "trainer", *arguments[separator + 1 :]]
    options.training_script_args = ["-I", str(DIE_WITH_PARENT), str(os.getpid()), *trainer]
    try:
        run(options)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code
    except SignalException as error:
        return 128 + error.sigval
    return 0


def known_to(parser: ArgumentParser, options: list[str]) -> list[str]:
    """torchrun's options without --shutdown-timeout where torch is too old for it.

    Such a torchrun gives its ranks 30 seconds to end.  Whoever started it kills it before that, and
    they die with it.
    """
    if TIMEOUT not in options or TIMEOUT in parser.format_help():
        return options
    place = options.index(TIMEOUT)
    return options[:place] + options[place + 2 :]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
