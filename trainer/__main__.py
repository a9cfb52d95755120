"""`torchrun -m trainer STAGE --run DIR`: one stage of one run.  Also the commands that need torch: shards, doctor, ..."""

from __future__ import annotations

import argparse
import os
import sys


def main(argv: list[str]) -> int:
    """Exit codes: 0 done, 1 ours, 2 the user's mistake, 75 interrupted with a checkpoint (run again, it goes on)."""
    from .config import UserError

    try:
        if argv and argv[0] in COMMANDS:
            return COMMANDS[argv[0]](argv[1:]) or 0
        return run_stage(argv)
    except UserError as mistake:
        if os.environ.get("RANK", "0") == "0":
            print("\n".join(f"error: {line}" for line in str(mistake).splitlines()), file=sys.stderr)
        return 2


def run_stage(argv: list[str]) -> int:
    names = [
        "generalist",
        "measure",
        "cluster",
        "route",
        "specialist",
        "combine",
        "control",
        "student",
        "evaluate",
        "report",
    ]
    parser = argparse.ArgumentParser(prog="trainer", description=__doc__)
    parser.add_argument("stage", choices=names, metavar="STAGE", help=" | ".join([*names, *COMMANDS]))
    parser.add_argument("--run", required=True, metavar="DIR")
    parser.add_argument("--index", type=int, nargs="+", default=[], help="which specialists")
    parser.add_argument("--name", nargs="+", default=[], help="which controls or students")
    args = parser.parse_args(argv)

    from .distributed import process_group
    from .session import Session, open_run, start_logging
    from .stages import STAGES

    run = open_run(args.run)
    work = [(stage, extra) for stage, extra in chosen(run, args) if not stage.is_done]
    if not work:
        return 0
    start_logging()
    with process_group(run.config.engine) as ranks:
        session = Session(run, ranks)
        for stage, extra in work:
            STAGES[args.stage](session, stage, *extra)
    return 0


def chosen(run, args) -> list[tuple]:
    """The stages that the command line names, each with what its function takes beside session and stage."""
    from .config import UserError

    if args.stage == "specialist":
        if not args.index:
            raise UserError("specialist: say which by --index I [I ...]")
        absent = [i for i in args.index if not 0 <= i < run.num_specialists]
        if absent:
            raise UserError(
                f"--index {absent[0]}: there are {run.num_specialists} specialists, 0 to {run.num_specialists - 1}"
            )
        return [(run.specialists[i], (i,)) for i in args.index]
    if args.stage in ("control", "student"):
        known = run.controls if args.stage == "control" else run.students
        if not args.name:
            raise UserError(f"{args.stage}: say which by --name NAME: {', '.join(known)}")
        for name in args.name:
            if name not in known:
                raise UserError(f"--name {name}: this run's are {', '.join(known) or 'none'}")
        return [(known[name], (name,)) for name in args.name]
    return [(getattr(run, args.stage), ())]


def shards(argv: list[str]) -> int:
    from .data.commands import main as shards_main

    return shards_main(argv)


def doctor(argv: list[str]) -> int:
    from .doctor import main as doctor_main

    return doctor_main(argv)


COMMANDS = {"shards": shards, "doctor": doctor}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
