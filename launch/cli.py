"""The command line `referral`.  Exit codes: 0 done, 1 a job failed, 2 a mistake of the user's, 130 interrupted."""

from __future__ import annotations

import importlib.util
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import tomli_w
import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipeline import compare as comparing
from pipeline.config import Config, UserError, load_config
from pipeline.graph import RunDirectory, open_run
from pipeline.store import Stage, write_json

from . import demo as demos
from . import sbatch, slurm
from .display import Display
from .journal import Journal, read_journal
from .local import (
    INTERRUPTED,
    TRAINER,
    USERS_MISTAKE,
    Pool,
    locked,
    stop_launcher,
    tethered,
    trainer_command,
)
from .machine import this_machine
from .plan import Job, plan
from .prepare import check, check_place, lay_out, save_environment
from .results import comparison_table, show_results
from .status import failures, statuses, summary, table

app = typer.Typer(
    help="A generalist, specialists for the classes that it confuses, one distribution, one student.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
FAKE: list[str] | None = None  # a command that stands for the trainer, in tests


class Runner(StrEnum):
    local = "local"
    slurm = "slurm"


RunOption = Annotated[
    Path, typer.Option("--run", metavar="DIR", help="The run's directory, made if absent.")
]
SetOption = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override one key: --set train.steps=500. May be repeated.",
    ),
]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Redo the stages that another config made.")
]
DryOption = Annotated[
    bool, typer.Option("--dry-run", help="Print the jobs; write and start nothing.")
]
OnOption = Annotated[Runner, typer.Option("--on", help="Where the jobs run.")]
ConfigArgument = Annotated[
    Path | None,
    typer.Argument(metavar="CONFIG.toml", help="The config; without one, that of the run itself."),
]
DirArgument = Annotated[Path, typer.Argument(metavar="DIR", help="The run's directory.")]


@app.command()
def run(
    run: RunOption,
    config: ConfigArgument = None,
    on: OnOption = Runner.local,
    dry_run: DryOption = False,
    force: ForceOption = False,
    set: SetOption = [],  # noqa: B006
) -> int:
    """Start a run, or go on with it: what is done is not done again."""
    return start(_config(config, run, set), run, on, force, dry_run)


@app.command()
def prepare(
    run: RunOption,
    config: ConfigArgument = None,
    force: ForceOption = False,
    set: SetOption = [],  # noqa: B006
) -> int:
    """Check the config and lay out the run's directory; start nothing."""
    found, stale = check(_config(config, run, set), run, force)
    code = check_by_trainer(found.config, this_machine(found.config).ranks)
    if code:
        return code
    with locked(run):
        lay_out(found, plan(found, this_machine(found.config).ranks), stale)
    _console().print(
        Text(f"{run} is ready: referral run --run {shlex.quote(str(run))}"), soft_wrap=True
    )
    return 0


@app.command()
def demo(
    run: RunOption = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Of the data and of all training.")] = 0,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Only a look at every stage: fewer classes, fewer steps."),
    ] = False,
    force: ForceOption = False,
    set: SetOption = [],  # noqa: B006
) -> int:
    """The whole job on glyph images that it renders itself."""
    config = demos.demo_config(run, seed, quick, set)
    _console().print(Text(demos.announcement(run, quick)), soft_wrap=True)
    check_place(run, beside=("data",))
    if not demos.has_glyphs(run, seed, quick):
        with locked(run):
            demos.make_glyphs(run, seed, quick, FAKE)
    return start(config, run, Runner.local, force, beside=("data",))


@app.command()
def status(
    directory: DirArgument,
    watch: Annotated[
        bool, typer.Option("--watch", help="Look again every second, until all is done.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> int:
    """Every stage: waiting, running, done, failed."""
    found = open_run(directory)
    jobs, console = plan(found), _console()
    journal, doubt = current_journal(found, jobs)
    stages = statuses(found, jobs, journal)
    if as_json:
        rows = [asdict(stage) for stage in stages]
        print(
            json.dumps(
                {"run": str(found.root), "runner": journal.runner, "doubt": doubt, "stages": rows},
                indent=2,
            )
        )
        return 0
    if watch and console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            while not all(stage.state == "done" for stage in stages):
                live.update(table(stages, f"{summary(stages)} {doubt}"), refresh=True)
                time.sleep(5 if journal.runner == "slurm" else 1)
                journal, doubt = current_journal(found, jobs)
                stages = statuses(found, jobs, journal)
    console.print(Text(summary(stages)))
    if doubt:
        console.print(Text(doubt), soft_wrap=True)
    console.print(table(stages))
    if journal.jobs:
        console.print(Text(f"logs: {found.root / 'logs'}"), soft_wrap=True)
    for line in failures(found, stages, journal):
        console.print(Text(line), soft_wrap=True)
    return 0


@app.command()
def cancel(directory: DirArgument) -> int:
    """Stop a run; what it has is kept, and `retry` goes on with it."""
    found = open_run(directory)
    journal = read_journal(found.root)
    if journal.runner == "slurm":
        with locked(found.root):
            stopped = slurm.cancel(found, slurm.look(found, plan(found), journal))
        said = f"cancelled {len(stopped)} jobs" if stopped else "no job is queued"
    else:
        said = "stopped" if stop_launcher(found.root) else "nothing is running"
    _console().print(Text(f"{directory}: {said}"), soft_wrap=True)
    return 0


@app.command()
def retry(directory: DirArgument) -> int:
    """Run again what failed, was cancelled or got lost, and what stands behind it, where it ran before."""
    found = open_run(directory)
    return start(found.config, directory, Runner(read_journal(directory).runner), force=False)


@app.command()
def report(directory: DirArgument) -> int:
    """Write results.json and report.html of an evaluated run anew."""
    found = open_run(directory)
    if not (found.evaluate.is_done or found.evaluate.is_older):
        raise UserError(
            f"{directory} is not evaluated yet: referral run --run {shlex.quote(str(directory))}"
        )
    job = plan(found)[-1]
    with locked(found.root):
        found.report.clear()
        code = subprocess.run(
            trainer_command(job, found, [found.report], FAKE or TRAINER)
        ).returncode
    if code == 0:
        show_results(found, _console())
    return code


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Finished runs.")],
    metric: Annotated[
        str, typer.Option("--metric", metavar="NAME,...", help="Which figures: top1,nll,...")
    ] = "",
    by: Annotated[
        str,
        typer.Option(
            "--by", metavar="KEY,...", help="Tell variants apart by these config keys alone."
        ),
    ] = "",
    versus: Annotated[
        str | None,
        typer.Option(
            "--versus", metavar="ROW", help="Every figure less that of this row in the same run."
        ),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json", metavar="FILE", help="Also write all of it, each run's figures too."
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.png", help="Also draw it.")
    ] = None,
) -> int:
    """Mean and sample deviation over runs: other seeds are repetitions, other configs variants side by side."""
    found = comparing.compare(
        comparing.read_runs(runs), comparing.words(metric), comparing.words(by), versus
    )
    console = _console()
    for line in comparing.sentences(found):
        console.print(Text(line), soft_wrap=True)
    console.print(comparison_table(found))
    if json_file is not None:
        try:
            write_json(json_file, found)
        except OSError as mistake:
            raise UserError(f"--json {json_file}: cannot be written: {mistake.strerror}") from None
    if plot is None:
        return 0
    options = [
        f"--metric={metric}",
        f"--by={by}",
        *([f"--versus={versus}"] if versus is not None else []),
    ]
    command = [*(FAKE or TRAINER), "compare", *map(str, runs), "--plot", str(plot), *options]
    return subprocess.run(command).returncode


def _pass_on(name: str, text: str) -> None:
    """A command whose work needs torch: its arguments go to `python -m trainer NAME` as they are."""

    @app.command(
        name,
        help=text,
        add_help_option=False,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )
    def command(context: typer.Context) -> int:
        return subprocess.run([*(FAKE or TRAINER), name, *context.args]).returncode


_pass_on(
    "shards",
    "Make, convert and check shards: glyphs | folder | arrays | from-webdataset | index | validate.",
)
_pass_on("export", "Write the ensemble or a student as one bundle.")
_pass_on("predict", "Classify files with a finished run.")
_pass_on("doctor", "Check this machine and what is installed.")


# What run and demo share


def start(
    config: Config,
    root: Path,
    on: Runner,
    force: bool,
    dry_run: bool = False,
    beside: tuple[str, ...] = (),
) -> int:
    """Check, lay out, run what is not done, and print the results."""
    found, stale = check(config, root, force, beside)
    machine = this_machine(found.config) if on is Runner.local else None
    jobs, console = (
        plan(found, machine.ranks if machine else sbatch.ranks(found.config)),
        _console(),
    )
    if dry_run:
        if machine:
            show_plan(found, jobs, stale, console)
        else:
            show_submission(found, jobs)
        return 0
    if machine is None:
        slurm.ask(["sbatch", "--version"])  # is there a Slurm at all, before anything is written
    code = 0
    if stale or not (found.root / "config.toml").exists():
        code = check_by_trainer(found.config, jobs[0].processes, on)
        if code:
            return code
    if not all(job.is_done for job in jobs):
        with locked(found.root):
            if machine is None:
                return hand_over(found, jobs, stale, console)
            refuse_while_queued(found, jobs)
            lay_out(found, jobs, stale)
            save_environment(found.root)
            with Display(console) as display:
                code = Pool(found, jobs, machine, display, FAKE).execute()
    if found.report.is_done:
        show_results(found, console)
    return code


def hand_over(run: RunDirectory, jobs: list[Job], stale: list[Stage], console: Console) -> int:
    """Submit to Slurm what is neither done nor queued."""
    began = time.monotonic()
    journal = slurm.settle(
        run, jobs, read_journal(run.root), lambda text: console.print(Text(text), soft_wrap=True)
    )
    if stale and (queued := slurm.live(journal)):
        raise UserError(
            f"{run.root}: stages would be redone while {len(queued)} jobs of their old config are queued; first: "
            f"referral cancel {shlex.quote(str(run.root))}"
        )
    lay_out(run, jobs, stale)
    save_environment(run.root)
    submitted = slurm.submit(run, jobs, journal)
    rows = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("job", "id", "waits for"):
        rows.add_column(column, overflow="fold", no_wrap=column != "waits for")
    for batch, number in submitted:
        name = batch.name + (f" x {len(batch.jobs)}" if batch.places is not None else "")
        rows.add_row(Text(name), number, Text(_shortened(batch.waits_for)))
    console.print(rows if submitted else Text("every job that is left is queued already"))
    said = (
        f"{len(submitted)} submissions in {time.monotonic() - began:.1f} s; " if submitted else ""
    )
    console.print(
        Text(f"{said}referral status {shlex.quote(str(run.root))} --watch"), soft_wrap=True
    )
    return 0


def refuse_while_queued(run: RunDirectory, jobs: list[Job]) -> None:
    """Raises UserError if jobs of this run wait or run in Slurm."""
    journal = read_journal(run.root)
    if journal.runner == "slurm" and (queued := slurm.live(slurm.look(run, jobs, journal))):
        raise UserError(
            f"{run.root} has {len(queued)} jobs in Slurm ({_shortened(list(queued.values()))}); to run it here, first: "
            f"referral cancel {shlex.quote(str(run.root))}"
        )


def current_journal(run: RunDirectory, jobs: list[Job]) -> tuple[Journal, str]:
    """The last launch's journal, brought up to date by Slurm; and why that could not be done, where it could not."""
    journal = read_journal(run.root)
    if journal.runner != "slurm":
        return journal, ""
    try:
        return slurm.look(run, jobs, journal), ""
    except UserError as mistake:
        return journal, f"only what the run directory says, for Slurm does not answer: {mistake}"


def check_by_trainer(config: Config, processes: int, on: Runner = Runner.local) -> int:
    """What only torch and a look into the shards can find wrong, before anything is written.  The trainer says what.

    A login node without torch leaves it to the first job, and one without a GPU says nothing against those of Slurm.
    """
    if importlib.util.find_spec("torch") is None:
        return 0
    if on is Runner.slurm:
        config = config.model_copy(
            update={"engine": config.engine.model_copy(update={"device": "auto"})}
        )
    command = [*(FAKE or TRAINER), "check", "--processes", str(processes)]
    return subprocess.run(
        tethered(command), input=tomli_w.dumps(config.dump()), text=True
    ).returncode


def show_plan(run: RunDirectory, jobs: list[Job], stale: list[Stage], console: Console) -> None:
    """The jobs, and below them the command that each would run now, longest chain first."""
    redone = {stage.place for stage in stale}
    left = {job.name: [s for s in job.stages if not s.is_done or s.place in redone] for job in jobs}
    rows = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("job", "stages", "processes", "waits for", "state"):
        rows.add_column(column, overflow="fold", no_wrap=column == "job")
    for job in jobs:
        stages = _shortened([stage.place for stage in job.stages])
        state = "to run" if left[job.name] else "done"
        cells = (job.name, stages, str(job.processes), _shortened(job.waits_for), state)
        rows.add_row(*(Text(cell) for cell in cells))
    console.print(rows)
    for job in sorted(jobs, key=lambda job: -job.chain):
        if left[job.name]:
            console.print(
                Text(shlex.join(trainer_command(job, run, left[job.name], FAKE))), soft_wrap=True
            )


def show_submission(run: RunDirectory, jobs: list[Job]) -> None:
    """The sbatch commands, as a script that does the same by hand, and what they submit."""
    journal = slurm.look(run, jobs, read_journal(run.root))
    size = slurm.max_array_size() if shutil.which("scontrol") else sbatch.MAX_ARRAY_SIZE
    chosen = slurm.choose(run, jobs, journal)
    print(f"# site file: {slurm.site_file(run.root) or 'none'}")
    print(sbatch.shell_script(run, jobs, chosen, slurm.live(journal), size))
    print(f"\n# {sbatch.SCRIPT}:\n{sbatch.SCRIPT.read_text()}", end="")


def _shortened(names: Sequence[str], most: int = 4) -> str:
    listed = ", ".join(names[:most])
    return listed + (f" and {len(names) - most} more" if len(names) > most else "")


def _config(path: Path | None, root: Path, overrides: list[str]) -> Config:
    if path is None and not (root / "config.toml").is_file():
        raise UserError(f"{root} is not a run yet; name the config that it is to be made of")
    return load_config(path or root / "config.toml", overrides)


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=200)


def main() -> int:
    try:
        return app(sys.argv[1:] or ["--help"], standalone_mode=False) or 0
    except UserError as mistake:
        _complain(str(mistake))
        return USERS_MISTAKE
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as mistake:
        if not hasattr(mistake, "format_message"):  # how typer's usage errors are told from ours
            raise
        _complain(mistake.format_message())
        return USERS_MISTAKE


def _complain(text: str) -> None:
    print("\n".join(f"error: {line}" for line in text.splitlines()), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
