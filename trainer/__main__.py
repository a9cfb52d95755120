"""Stages of a run, or a command that needs torch.

    python -P -m trainer STAGE ... --run DIR
    PYTHONSAFEPATH=1 torchrun --nproc-per-node 2 -m trainer -- STAGE ... --run DIR

-P and PYTHONSAFEPATH keep the working directory, which may hold a trainer.py of the user's, from
the path of imports.  Without the `--` torchrun takes --run for its own --run-path.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

    from pipeline.graph import RunDirectory
    from pipeline.store import Stage

    from .session import Session

HELP = (
    "Do stages of a run that `referral prepare` laid out, in this process or, under torchrun, on "
    "several ranks."
)
EXAMPLE = """python -P -m trainer specialist --index 3 --run runs/mine
PYTHONSAFEPATH=1 torchrun --nproc-per-node 2 -m trainer -- generalist --run runs/mine"""
RANK_0_FIRST_S = (
    5.0  # how long rank 0 has to say everybody's error before another rank says its own
)
NEXT_RANK_S = 0.5  # longer for each further rank, so that one of them says it
COMMANDS = {
    "check": "trainer.commands.check:main",
    "sizes": "trainer.commands.sizes:main",
    "shards": "trainer.commands.shards:main",
    "init": "trainer.commands.init:main",
    "doctor": "trainer.commands.doctor:main",
    "export": "trainer.commands.export:main",
    "evaluate-data": "trainer.commands.evaluate:main",
    "predict": "trainer.commands.predict:main",
    "compare": "trainer.commands.compare_plot:main",
}


def main(argv: list[str]) -> int:
    """Exit codes: 0 done, 1 our error, 2 the user's, 75 interrupted: run again to resume."""
    from pipeline.failures import PASSING, answer, paths_among

    # What Pillow warns of is either harmless or an error that is said in one line.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    if argv[:1] == ["--"]:  # `torchrun -m trainer -- STAGE --run DIR`: --run is torchrun's, too
        argv = argv[1:]
    places = paths_among(argv)
    if argv and argv[0] in COMMANDS:
        return answer(lambda: run_command(argv), places, before_saying=let_rank_0_speak)
    # A stage heeds SIGTERM itself.  What is not there may be there at another try.
    return answer(
        lambda: run_stages(argv),
        places,
        signals=(signal.SIGINT,),
        before_saying=let_rank_0_speak,
        passing=(*PASSING, errno.ENOENT),
    )


def run_command(argv: list[str]) -> int:
    from pipeline.choices import resolve

    command: Callable[[list[str]], int | None] = resolve(COMMANDS[argv[0]])
    return command(argv[1:]) or 0


def let_rank_0_speak() -> None:
    """Let rank 0 say an error for all: torchrun ends every rank with the first that ends."""
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(RANK_0_FIRST_S + (rank - 1) * NEXT_RANK_S)


def run_stages(argv: list[str]) -> int:
    from pipeline.graph import open_run
    from pipeline.store import blaming_unchecked
    from pipeline.trust import COMMAND, FUNCTION, check_trusted

    args = parse(argv)
    run = open_run(args.run)
    check_trusted(run, args.trust, (FUNCTION, COMMAND))
    chosen = [stage for name in args.stages for stage in choose(run, name, args)]
    pending = [stage for stage in chosen if not stage.is_done]
    if not pending:
        return 0

    from .distributed.ranks import process_group
    from .session import Session, start_logging
    from .stages import run_together

    start_logging()
    with process_group(run.config.engine) as ranks:
        session = Session(run.with_stages(args.stages), ranks)
        check_where_left(session)
        for alike in in_a_row(pending):
            with blaming_unchecked(run.root):
                for stage in alike:
                    check_inputs(stage)
                run_together(session, alike)
    return 0


def in_a_row(stages: list[Stage]) -> list[list[Stage]]:
    """Neighbours that can be done together. Each other stage by itself."""
    parts: list[list[Stage]] = []
    for stage in stages:
        together = stage.kind.together
        if together and parts and parts[-1][-1].kind.together == together:
            parts[-1].append(stage)
        else:
            parts.append([stage])
    return parts


def check_where_left(session: Session) -> None:
    """Check the networks on rank 0, if the machine that laid RUN out could not."""
    from pipeline.store import UNCHECKED

    from .distributed.ranks import broadcast

    marker = session.run.root / UNCHECKED
    if not broadcast(marker.exists(), session.ranks):
        return
    if session.ranks.is_main:
        from .commands.check import check

        for warning in check(session.config, session.ranks.world_size, session.run.root):
            session.say("warning: %s", warning)
        marker.unlink(missing_ok=True)
    session.barrier()


def parse(argv: list[str]) -> argparse.Namespace:
    from pipeline.config import UserError
    from pipeline.stages import KINDS
    from pipeline.trust import HELP as TRUST
    from pipeline.usage import Parser, nearest

    parser = Parser("python -P -m trainer", HELP, EXAMPLE)
    parser.add_argument("stages", nargs="+", metavar="STAGE", help=", ".join(KINDS))
    parser.add_argument("--run", required=True, metavar="DIR", help="the run's directory")
    families = {
        option: ", ".join(kind.name for kind in KINDS.values() if kind.addressed_by == option)
        for option in ("index", "name")
    }
    parser.add_argument(
        "--index", type=int, nargs="+", default=[], help=f"which of: {families['index']}"
    )
    parser.add_argument("--name", nargs="+", default=[], help=f"which of: {families['name']}")
    parser.add_argument("--trust", action="store_true", help=TRUST)
    args = parser.parse_args(argv or ["--help"])
    for word in args.stages:
        if word not in KINDS:
            known = [*KINDS, *COMMANDS]
            raise UserError(f"no such stage or command {word}{nearest(word, known)}")
    return args


def choose(run: RunDirectory, name: str, args: argparse.Namespace) -> list[Stage]:
    """The stages of one kind that the command line names."""
    from pipeline.config import UserError
    from pipeline.stages import KINDS

    kind = KINDS[name]
    stages = run.find(name)
    if kind.addressed_by == "nothing":
        if not stages:
            raise UserError(f"{name}: this run has no such stage")
        return stages
    option = f"--{kind.addressed_by}"
    known = {stage.address: stage for stage in stages}
    addresses = getattr(args, kind.addressed_by)
    listed = describe(list(known))
    if not addresses:
        raise UserError(f"{name}: say which by {option}; this run has {listed}")
    absent = [address for address in addresses if address not in known]
    if absent:
        raise UserError(f"{option} {absent[0]}: no {name} is called so; this run has {listed}")
    return [known[address] for address in addresses]


def describe(addresses: list) -> str:
    """`0 to 11`, `main, wide` or `none`."""
    if not addresses:
        return "none"
    if all(isinstance(address, int) for address in addresses):
        return f"{min(addresses)} to {max(addresses)}"
    return ", ".join(addresses)


def check_inputs(stage: Stage) -> None:
    """Raises UserError if another stage must be done first.

    A missing specialist is for the stage itself to judge.  The results of an older version can be
    reported.
    """
    from pipeline.config import UserError

    needed = [each for each in stage.inputs if each.name != "specialist"]
    missing = [
        f"{each.place} ({each.lacks})" if each.lacks else each.place
        for each in needed
        if not (each.is_done or each.is_older)
    ]
    if missing:
        raise UserError(
            f"{stage.place} needs {', '.join(missing)}, which is not done: run it first"
        )


if __name__ == "__main__":
    from pipeline.interrupts import end_at_once

    end_at_once((signal.SIGINT,))
    from .distributed.exit import leave

    leave(lambda: main(sys.argv[1:]))
