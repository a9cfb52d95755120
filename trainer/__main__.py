"""`torchrun -m trainer STAGE [STAGE ...] --run DIR`: stages of one run.  Also what needs torch: shards, doctor, ..."""

from __future__ import annotations

import argparse
import os
import sys
import time

FIRST_SAYS_S = 5.0  # what rank 0 has to say the mistake of all ranks before another says its own


def main(argv: list[str]) -> int:
    """Exit codes: 0 done, 1 ours, 2 the user's mistake, 75 interrupted with a checkpoint (run again, it goes on)."""
    from pipeline.config import UserError

    if argv[:1] == [
        "--"
    ]:  # `torchrun -m trainer -- STAGE --run DIR`: torchrun would take --run for its own --run-path
        argv = argv[1:]
    try:
        if argv and argv[0] in COMMANDS:
            return COMMANDS[argv[0]](argv[1:]) or 0
        return run_stages(argv)
    except UserError as mistake:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(FIRST_SAYS_S)  # torchrun ends the other ranks with the first that ends
        print("\n".join(f"error: {line}" for line in str(mistake).splitlines()), file=sys.stderr)
        return 2


def run_stages(argv: list[str]) -> int:
    names = "generalist member measure cluster route specialist combine answers control student evaluate report".split()
    parser = argparse.ArgumentParser(prog="trainer", description=__doc__)
    parser.add_argument(
        "stages", choices=names, nargs="+", metavar="STAGE", help=" | ".join([*names, *COMMANDS])
    )
    parser.add_argument("--run", required=True, metavar="DIR")
    parser.add_argument(
        "--index", type=int, nargs="+", default=[], help="which specialists or members"
    )
    parser.add_argument("--name", nargs="+", default=[], help="which controls, students or answers")
    args = parser.parse_args(argv)

    from .session import open_run

    run = open_run(args.run)
    work = [
        (name, stage, extra)
        for name in args.stages
        for stage, extra in chosen(run, name, args)
        if not stage.is_done
    ]
    if not work:
        return 0

    from .distributed.ranks import process_group
    from .session import Session, start_logging
    from .stages.story import STAGES

    start_logging()
    with process_group(run.config.engine) as ranks:
        session = Session(run, ranks)
        for name, stage, extra in work:
            check_inputs(stage)
            STAGES[name](session, stage, *extra)
    return 0


def check_inputs(stage) -> None:
    """Raises UserError if another stage must be done first; a missing specialist is for `combine` to judge."""
    from pipeline.config import UserError

    missing = [wanted.place for wanted in stage.inputs if not wanted.is_done]
    if missing and stage.name != "combine":
        raise UserError(
            f"{stage.place} needs {', '.join(missing)}, which is not done: run it first"
        )


def chosen(run, name: str, args) -> list[tuple]:
    """The stages that the command line names, each with what its function takes beside session and stage."""
    from pipeline.config import UserError

    if name in ("specialist", "member"):
        known = dict(
            enumerate(run.specialists) if name == "specialist" else enumerate(run.members, 1)
        )
        if not args.index:
            raise UserError(f"{name}: say which by --index I [I ...]")
        absent = [i for i in args.index if i not in known]
        if absent:
            raise UserError(f"--index {absent[0]}: there are {len(known)} {name}s, {_span(known)}")
        return [(known[i], (i,)) for i in args.index]
    if name in ("control", "student", "answers"):
        known = {"control": run.controls, "student": run.students, "answers": run.answers}[name]
        if not args.name:
            raise UserError(f"{name}: say which by --name NAME: {', '.join(known)}")
        for each in args.name:
            if each not in known:
                raise UserError(f"--name {each}: this run's are {', '.join(known) or 'none'}")
        return [(known[each], (each,)) for each in args.name]
    return [(getattr(run, name), ())]


def _span(known: dict) -> str:
    return f"{min(known)} to {max(known)}" if known else "this run has none"


def shards(argv: list[str]) -> int:
    from .commands.shards import main as shards_main

    return shards_main(argv)


def check(argv: list[str]) -> int:
    from .commands.check import main as check_main

    return check_main(argv)


def doctor(argv: list[str]) -> int:
    from .commands.doctor import main as doctor_main

    return doctor_main(argv)


def export(argv: list[str]) -> int:
    from .commands.export import main as export_main

    return export_main(argv)


def predict(argv: list[str]) -> int:
    from .commands.predict import main as predict_main

    return predict_main(argv)


def compare(argv: list[str]) -> int:
    from .commands.compare_plot import main as compare_main

    return compare_main(argv)


COMMANDS = {
    "check": check,
    "shards": shards,
    "doctor": doctor,
    "export": export,
    "predict": predict,
    "compare": compare,
}

if __name__ == "__main__":
    from .distributed.exit import leave

    leave(lambda: main(sys.argv[1:]))
