"""The command line `referral`.

Exit codes: 0 done, 1 a job failed, 2 an error of the user's, 130 interrupted.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import tomli_w
import typer
from rich.live import Live
from rich.table import Table
from rich.text import Text
from typer.main import get_command

from pipeline import compare as comparing
from pipeline.advice.levers import LEVERS, SCARCITIES
from pipeline.config import Config, UserError, flat, load_config
from pipeline.config.loading import apply_override
from pipeline.extras import require
from pipeline.failures import answer, cannot_write, paths_among
from pipeline.files import json_text, picking_from
from pipeline.graph import RunDirectory, open_run
from pipeline.store import Stage, write_json
from pipeline.terminal import Console, wide_console
from pipeline.trust import (
    COMMAND,
    EVERYTHING,
    FUNCTION,
    HELP,
    Code,
    check_trusted,
    code_in,
    code_of_key,
)
from pipeline.typer_usage import Command, application, call
from pipeline.version import VERSION

from . import demo as demos
from . import sbatch, slurm
from .advised import (
    ToAdvise,
    config_as_advised,
    config_before,
    configs_to_advise,
    save_advised_on,
)
from .aims import ADVISE, AIMS, RUN, Aim
from .calling import TRAINER, call_trainer
from .display import Display
from .forecast import seconds_to_go
from .journal import Journal, read_journal
from .local import GRACE_S, Pool, trainer_command
from .lock import locked, stop_launcher
from .machine import this_machine, visible_devices
from .plan import Job, plan
from .prepare import (
    absolute,
    check,
    check_batches,
    check_file_system,
    check_lengths,
    check_place,
    lay_out,
    mend,
    save_environment,
)
from .results import comparison_tables, show_results
from .sizing import NOTE, Sizing, inputs_of, network_sizes, warnings
from .sizing import as_json as as_object
from .sizing import table as table_of_needs
from .status import (
    TIME_LEGEND,
    StageStatus,
    failures,
    next_command,
    statuses,
    summary,
    table,
)

NAME = "referral"
app = application(
    "Train classifiers over huge label sets: a generalist, specialists for the classes that it "
    "confuses, and a student of both.",
    "referral demo --run runs/demo\nreferral run examples/folder.toml --run runs/mine",
)
SHELLS = ("bash", "zsh", "fish", "powershell")
WATCH_S = {"local": 1, "slurm": 5}  # between two looks of `status --watch`
FAKE: list[str] | None = None  # a command that stands for the trainer, in tests


class Runner(StrEnum):
    local = "local"
    slurm = "slurm"


def _no_option(path: Path | None) -> Path | None:
    """A path that begins with a dash in full: the commands that are started from here get it."""
    return path.absolute() if path is not None and str(path).startswith("-") else path


RunOption = Annotated[
    Path,
    typer.Option(
        "--run",
        metavar="DIR",
        help="The run's directory, made if absent.",
        callback=_no_option,
    ),
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
OnOption = Annotated[
    Runner, typer.Option("--on", metavar="local|slurm", help="Where the jobs run.")
]
TrustOption = Annotated[
    bool, typer.Option("--trust", help=f"{HELP[0].upper()}{HELP[1:]} (docs/security.md).")
]
ConfigArgument = Annotated[
    Path | None,
    typer.Argument(metavar="CONFIG.toml", help="The config. By default the run's own."),
]
SourceArgument = Annotated[
    Path, typer.Argument(metavar="CONFIG.toml|RUN", help="A config, or a run that exists.")
]
AdvisedRunOption = Annotated[
    Path | None,
    typer.Option(
        "--run",
        metavar="DIR",
        help="The run's directory, made if absent. Needed with a config.",
        callback=_no_option,
    ),
]
AdvisedOption = Annotated[
    bool, typer.Option("--advised", help="Go on with what `referral advise` found best.")
]
BudgetOption = Annotated[
    float | None,
    typer.Option(
        "--budget",
        metavar="SHARE",
        help="What the pilots may cost, as a share of the generalist's training. [0.3]",
    ),
]
ScarceOption = Annotated[
    str | None,
    typer.Option(
        "--scarce", metavar="NAME", help=f"What you are short of: {', '.join(SCARCITIES)}."
    ),
]
LimitOption = Annotated[
    float | None,
    typer.Option(
        "--limit",
        metavar="X",
        help="How much of it the next step may take, in multiples of the generalist's own.",
    ),
]
WorkersOption = Annotated[
    int | None,
    typer.Option("--workers", metavar="W", help="How many jobs can train side by side. [1]"),
]
DirArgument = Annotated[
    Path, typer.Argument(metavar="DIR", help="The run's directory.", callback=_no_option)
]
SeedOption = Annotated[
    int, typer.Option("--seed", help="The seed of the data and of all training.")
]
QuickOption = Annotated[
    bool, typer.Option("--quick", help="Just a look at every stage: fewer classes and steps.")
]
WatchOption = Annotated[
    bool, typer.Option("--watch", help="Look again every second, until all is done.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
PlanOption = Annotated[
    bool,
    typer.Option("--plan", help="Print what each stage will hold, send, write and read; no more."),
]
InputsOption = Annotated[
    str,
    typer.Option(
        "--inputs",
        metavar="TYPE,LENGTH,...",
        help="With --plan, if no manifest says it: type and shape of one input, such as "
        "uint8,3,64,64.",
    ),
]
ExamplesOption = Annotated[
    str,
    typer.Option(
        "--examples",
        metavar="TRAIN,VAL,TEST",
        help="With --plan: how many examples to plan for, whatever the manifests say.",
    ),
]
RunsArgument = Annotated[list[Path], typer.Argument(metavar="RUN...", help="Finished runs.")]
MetricOption = Annotated[
    str, typer.Option("--metric", metavar="NAME,...", help="Which metrics, such as top1,nll.")
]
ByOption = Annotated[
    str,
    typer.Option("--by", metavar="KEY,...", help="The config keys that tell variants apart."),
]
VersusOption = Annotated[
    str | None,
    typer.Option("--versus", metavar="ROW", help="Differences to this row in the same run."),
]
JsonFileOption = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Also write all of it, each run's metrics too."),
]
PlotOption = Annotated[
    Path | None, typer.Option("--plot", metavar="FILE.png", help="Also draw it.")
]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"{NAME} {VERSION}")
        raise typer.Exit()


def _print_completion(shell: str) -> None:
    """A script that completes commands and options, for the shell to read at its start."""
    if not shell:
        return
    if shell not in SHELLS:
        raise UserError(f"--show-completion {shell}: must be one of {', '.join(SHELLS)}")
    from typer.completion import (
        get_completion_script,  # pyright: ignore[reportPrivateImportUsage]  # it has no other door
    )

    print(get_completion_script(prog_name=NAME, complete_var=COMPLETE, shell=shell))
    raise typer.Exit()


COMPLETE = f"_{NAME.upper()}_COMPLETE"  # the variable by which the script asks for words
VersionOption = Annotated[
    bool,
    typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version."),
]
CompletionOption = Annotated[
    str,
    typer.Option(
        "--show-completion",
        is_eager=True,
        metavar="SHELL",
        callback=_print_completion,
        help=f"Print the completion script of a shell: {', '.join(SHELLS)}.",
    ),
]


@app.callback()
def common(version: VersionOption = False, show_completion: CompletionOption = "") -> None:
    # Without a docstring: the application's help is the text.
    pass


def command(example: str, name: str | None = None):
    """Add a function to the application. Its docstring and the example are its help."""
    return app.command(name, cls=Command, epilog=example)


@command("referral run examples/folder.toml --run runs/mine --set train.epochs=20")
def run(
    run: RunOption,
    config: ConfigArgument = None,
    on: OnOption = Runner.local,
    dry_run: DryOption = False,
    force: ForceOption = False,
    advised: AdvisedOption = False,
    trust: TrustOption = False,
    set: SetOption = [],  # noqa: B006
) -> int:
    """Start or resume a run: what is done is not done again."""
    checked = _config(config, run, set) if not advised else _config_as_advised(config, run, set)
    named = None if trust else named_code(config, set)
    return start(checked, run, on, force, dry_run, named=named)


@command("referral advise examples/folder.toml --run runs/mine --scarce latency")
def advise(
    source: SourceArgument,
    run: AdvisedRunOption = None,
    budget: BudgetOption = None,
    scarce: ScarceOption = None,
    limit: LimitOption = None,
    workers: WorkersOption = None,
    on: OnOption = Runner.local,
    dry_run: DryOption = False,
    force: ForceOption = False,
    trust: TrustOption = False,
    set: SetOption = [],  # noqa: B006
) -> int:
    """Say which next step pays, from short trial trainings (pilots)."""
    asked = {"budget": budget, "scarce": scarce, "limit": limit, "workers": workers}
    own = [f"advise.{key}={value}" for key, value in asked.items() if value is not None]
    root = _root_to_advise(source, run)
    if source.is_dir():
        asked_of = configs_to_advise(root, [*set, *own])
    else:
        config = load_config(source, [*set, *own])
        asked_of = ToAdvise(config, config)
    aim = replace(ADVISE, spares_run=asked_of.goes_back)
    named = None if trust else named_code(None if source.is_dir() else source, set)
    code = start(asked_of.config, root, on, force, dry_run, aim=aim, named=named)
    if not dry_run and (root / "config.toml").is_file():
        save_advised_on(absolute(asked_of.about), root)
    return code


def _root_to_advise(source: Path, run: Path | None) -> Path:
    """RUN, of a config or of a run that exists."""
    if not source.is_dir():
        if not source.exists():
            raise UserError(f"{source}: no such config file and no such run")
        if run is None:
            raise UserError(f"{source} is a config; add --run DIR, where its run is to be made")
        return run
    if run is not None and run.resolve() != source.resolve():
        raise UserError(f"{source} is a run, and --run names another, {run}; leave one out")
    return open_run(source).root


@command(
    "referral prepare examples/folder.toml --run runs/mine\n"
    "referral prepare examples/million.toml --run runs/million --plan --on slurm "
    "--inputs uint8,3,224,224 --examples 100000000,1000000,1000000"
)
def prepare(
    run: RunOption,
    config: ConfigArgument = None,
    force: ForceOption = False,
    trust: TrustOption = False,
    set: SetOption = [],  # noqa: B006
    plan_only: PlanOption = False,
    on: OnOption = Runner.local,
    inputs: InputsOption = "",
    examples: ExamplesOption = "",
    as_json: JsonOption = False,
) -> int:
    """Check the config and lay out the run's directory; start nothing."""
    if plan_only:
        given = _config(config, run, set)
        named = named_code(config, set)
        laid_out = RunDirectory(run, absolute(given))
        return show_needs(laid_out, on, inputs, examples, as_json, trust, named)
    checked, stale = check(_config(config, run, set), run, force)
    check_trusted(checked, trust, named=named_code(config, set))
    jobs = plan(checked, this_machine(checked.config).ranks)
    check_batches(checked, jobs, stale)
    check_file_system(run)
    code = check_by_trainer(checked, jobs)
    if code:
        return code
    with locked(run):
        lay_out(checked, jobs, stale, unchecked=is_left_to_first_job(checked.config))
    _say(f"{run} is ready")
    wide_console().say_next(f"{NAME} run --run {shlex.quote(str(run))}")
    return 0


def show_needs(
    run: RunDirectory,
    on: Runner,
    given: str,
    examples: str,
    as_json: bool,
    trust: bool,
    named: Collection[Code],
) -> int:
    """What `prepare --plan` prints: the needs of each stage.  Nothing is written."""
    check_trusted(run, trust, named=named)
    check_lengths(run.config)
    known = inputs_of(run.config, given, examples)
    run.method.check(known.classes, "data.classes")
    if on is Runner.slurm:
        jobs = sbatch.plan_on_slurm(run)
    else:
        jobs = plan(run, this_machine(run.config).ranks)
    check_batches(run, jobs, [])
    require("torch", "prepare --plan")
    rows = Sizing(run, jobs, known, network_sizes(run.config, known, TRAINER)).rows()
    if as_json:
        print(json_text(as_object(rows, known), "plan", indent=2))
    else:
        print(table_of_needs(rows))
        print(NOTE)
    for warning in warnings(rows, run.config):
        print(f"warning: {warning}", file=sys.stderr)
    return 0


@command("referral demo --run runs/demo --quick")
def demo(
    run: RunOption = Path("runs/demo"),
    seed: SeedOption = 0,
    quick: QuickOption = False,
    force: ForceOption = False,
    set: SetOption = [],  # noqa: B006
) -> int:
    """Run the whole method on images of characters that it renders itself."""
    config = demos.demo_config(run, seed, quick, set)
    _say(demos.announcement(run, quick))
    check_place(run, beside=("data",))
    if not demos.has_glyphs(run, seed, quick):
        with locked(run):
            demos.make_glyphs(run, seed, quick, FAKE)
    if not quick:
        code = start(config, run, Runner.local, force, beside=("data",), aim=ADVISE)
        if code:
            return code
    code = start(config, run, Runner.local, force, beside=("data",))
    if quick and code == 0:
        wide_console().say_next(demos.whole_demo(run), demos.QUICK_MEANS_LITTLE)
    return code


@command("referral status runs/mine --watch")
def status(directory: DirArgument, watch: WatchOption = False, as_json: JsonOption = False) -> int:
    """Show every stage: waiting, running, done or failed."""
    run, jobs = launched(open_run(directory))
    console = wide_console()
    if watch and not as_json and console.is_terminal:
        _watch(run, jobs, console)
    journal, doubt = current_journal(run, jobs)
    stages = statuses(run, jobs, journal)
    if as_json:
        content = {
            "run": str(run.root),
            "runner": journal.runner,
            "doubt": doubt,
            "stages": [asdict(stage) for stage in stages],
        }
        print(json_text(content, "status", indent=2))
        return 0
    console.print(Text(summary(stages, time_to_go(run, jobs, stages, journal))))
    if doubt:
        _say(doubt, console)
    console.print(table(stages, width=console.width))
    console.say(TIME_LEGEND, "dim")
    if journal.jobs:
        _say(f"logs: {run.root / 'logs'}", console)
    for line in failures(run, stages, journal):
        _say(line, console)
    console.say_next(next_command(stages, journal, shlex.quote(str(directory))))
    return 0


def _watch(run: RunDirectory, jobs: list[Job], console: Console) -> None:
    """Show the stages until all are done."""
    with Live(console=console, auto_refresh=False) as live:
        while True:
            journal, doubt = current_journal(run, jobs)
            stages = statuses(run, jobs, journal)
            if all(stage.state == "done" for stage in stages):
                return
            title = summary(stages, time_to_go(run, jobs, stages, journal))
            live.update(table(stages, f"{title} {doubt}", console.width), refresh=True)
            time.sleep(WATCH_S[journal.runner])


def time_to_go(
    run: RunDirectory, jobs: list[Job], stages: list[StageStatus], journal: Journal
) -> float | None:
    """Seconds, of a run that is running: on as many slots as it has now, or a cluster's."""
    running = {stage.job for stage in stages if stage.state == "running"}
    if not running:
        return None
    slots = run.config.launch.pool or len(running)
    if journal.runner == "slurm":
        slots = run.config.slurm.throttle or len(jobs)
    return seconds_to_go(run, jobs, stages, slots)


@command("referral cancel runs/mine")
def cancel(directory: DirArgument) -> int:
    """Stop a run. What it has is kept, and `retry` resumes it."""
    run = open_run(directory)
    if read_journal(run.root).runner == "slurm":
        outcome = _cancel_in_slurm(run)
    elif stop_launcher(run.root, GRACE_S + 15):
        outcome = "stopped"
    else:
        outcome = "nothing is running"
    _say(f"{directory}: {outcome}")
    wide_console().say_next(f"{NAME} retry {shlex.quote(str(directory))}", "To go on with it")
    return 0


def _cancel_in_slurm(run: RunDirectory) -> str:
    journal = read_journal(run.root)
    run, jobs = launched(run)
    with locked(run.root):
        cancelled = slurm.cancel(run, slurm.look(run, jobs, journal))
    if not cancelled:
        return "no job is queued"
    return f"cancelled {len(cancelled)} jobs"


@command("referral retry runs/mine")
def retry(directory: DirArgument, trust: TrustOption = False) -> int:
    """Run again what failed, was cancelled or got lost, and what depends on it.

    It runs where it ran before: on this machine or on Slurm.
    """
    run = open_run(directory)
    journal = read_journal(directory)
    named = None if trust else ()
    on, aim = Runner(journal.runner), AIMS[journal.aim]
    return start(run.config, directory, on, force=False, aim=aim, named=named)


@command("referral report runs/mine")
def report(directory: DirArgument, trust: TrustOption = False) -> int:
    """Write results.json and report.html again, and print the results."""
    run = open_run(directory)
    if not (run.evaluate.is_done or run.evaluate.is_older):
        raise UserError(
            f"{directory} is not evaluated yet: referral run --run {shlex.quote(str(directory))}"
        )
    check_trusted(run, trust, (FUNCTION, COMMAND))
    (job,) = [job for job in plan(run) if run.report in job.stages]
    arguments = trainer_command(job, run, [run.report], FAKE or TRAINER)
    with locked(run.root):
        run.report.clear()
        code = call_trainer(arguments)
    if code == 0:
        show_results(run, wide_console())
    return code


@command("referral compare runs/seed-0 runs/seed-1 --metric top1,nll --versus generalist")
def compare(
    runs: RunsArgument,
    metric: MetricOption = "",
    by: ByOption = "",
    versus: VersusOption = None,
    json_file: JsonFileOption = None,
    plot: PlotOption = None,
) -> int:
    """Compare finished runs: mean and standard deviation over seeds.

    Runs that differ in more than the seed are shown side by side as variants.
    """
    finished = comparing.read_runs(runs)
    metrics, keys = comparing.words(metric), comparing.words(by)
    console = wide_console()
    with picking_from(Path(", ".join(str(run / "results.json") for run in runs))):
        comparison = comparing.compare(finished, metrics, keys, versus)
        for line in comparing.sentences(comparison):
            _say(line, console)
        for part in comparison_tables(comparison, console.width):
            console.print(part)
    if json_file is not None:
        try:
            write_json(json_file, comparison)
        except OSError as error:
            raise cannot_write(json_file, error, option="--json") from None
    if plot is None:
        return 0
    options = ["--plot", str(plot), f"--metric={metric}", f"--by={by}"]
    if versus is not None:
        options.append(f"--versus={versus}")
    return call_trainer([*(FAKE or TRAINER), "compare", *map(str, runs), *options])


PASSED_ON: dict[str, str] = {}  # commands that need torch, and what the trainer calls each


def _pass_on(name: str, text: str, command_name: str = "") -> None:
    """A command that needs torch: `python -P -m trainer NAME` gets its arguments as they are.

    Its own page of help, with an example, is printed there.
    command_name: the trainer's name of it, where a stage is called NAME.
    """
    PASSED_ON[name] = command_name or name

    @app.command(
        name,
        cls=Command,
        help=text,
        add_help_option=False,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )
    def pass_on(context: typer.Context) -> int:
        return call_trainer([*(FAKE or TRAINER), PASSED_ON[name], *context.args])


_pass_on(
    "shards",
    "Make, convert and check shards: folder, arrays, table, parquet, from-webdataset, index, "
    "validate, glyphs.",
)
_pass_on("init", "Write a commented config for data of your own: DATA [--out CONFIG.toml].")
_pass_on("export", "Write the ensemble or a student as one bundle.")
_pass_on("predict", "Classify files with a finished run.")
_pass_on(
    "evaluate",
    "Measure a finished run on labelled data: accuracy, classes, mistakes.",
    "evaluate-data",
)
_pass_on("doctor", "Check this machine and what is installed.")


# What run, advise and demo share


def start(
    config: Config,
    root: Path,
    on: Runner,
    force: bool,
    dry_run: bool = False,
    beside: tuple[str, ...] = (),
    aim: Aim = RUN,
    named: Collection[Code] | None = (),
) -> int:
    """Check, lay out, run what is not done, and print what was asked for.

    named: the code that the command itself names. None trusts whatever the config names.
    """
    run, stale = check(config, root, force, beside, aim)
    kinds = EVERYTHING if on is Runner.slurm else (FUNCTION, COMMAND)
    check_trusted(run, named is None, kinds, named or ())
    if on is Runner.slurm:
        return start_on_slurm(run, stale, dry_run, aim)
    return start_here(run, stale, dry_run, aim)


def start_here(run: RunDirectory, stale: list[Stage], dry_run: bool, aim: Aim) -> int:
    machine, console = this_machine(run.config), wide_console()
    jobs = plan(aim.run(run), machine.ranks, aim.stages(run))
    code = _check_new(run, jobs, stale, Runner.local, dry_run)
    if code:
        return code
    if dry_run:
        show_plan(run, jobs, stale, console)
        return 0
    for line in mend(run, jobs):
        _say(line, console)
    if not all(job.is_done for job in jobs):
        if FAKE is None:
            require("torch", "a run on this machine")
        with locked(run.root):
            refuse_while_queued(run)
            lay_out(run, jobs, stale, _is_unchecked(run, stale, Runner.local))
            save_environment(run.root)
            with Display(console) as display:
                pool = Pool(aim.run(run), jobs, machine, display, FAKE, aim.name)
                code = pool.execute()
    if aim.last(run).is_done:
        aim.show(run, console)
    return code


def start_on_slurm(run: RunDirectory, stale: list[Stage], dry_run: bool, aim: Aim) -> int:
    jobs = sbatch.plan_on_slurm(aim.run(run), aim.stages(run))
    if not dry_run:
        slurm.ask(["sbatch", "--version"])  # is there a Slurm at all, before anything is written
    code = _check_new(run, jobs, stale, Runner.slurm, dry_run)
    if code:
        return code
    if dry_run:
        show_submission(run, jobs)
        return 0
    console = wide_console()
    for line in mend(run, jobs):
        _say(line, console)
    if all(job.is_done for job in jobs):
        aim.show(run, console)
        return 0
    with locked(run.root):
        hand_over(run, jobs, stale, console, aim)
    return 0


def _check_new(
    run: RunDirectory, jobs: list[Job], stale: list[Stage], on: Runner, dry_run: bool
) -> int:
    """The batches of what is left to train. All else too, if the run is new or changed."""
    check_batches(run, jobs, stale)
    if not _is_new(run, stale):
        return 0
    if not dry_run:
        check_file_system(run.root)
    return check_by_trainer(run, jobs, on)


def _is_new(run: RunDirectory, stale: list[Stage]) -> bool:
    return bool(stale) or not (run.root / "config.toml").exists()


def check_by_trainer(run: RunDirectory, jobs: list[Job], on: Runner = Runner.local) -> int:
    """What only torch and a look into the shards can find wrong, before anything is written.

    The trainer prints it.  Returns its exit code.  A login node without torch leaves the check to
    the first job, and one without a GPU says nothing against those of Slurm.
    """
    if importlib.util.find_spec("torch") is None:
        return 0
    command = [*(FAKE or TRAINER), "check", "--processes", str(jobs[0].processes)]
    command += ["--run", str(run.root)]
    config = run.config
    if on is Runner.slurm:
        engine = config.engine.model_copy(update={"device": "auto"})
        config = config.model_copy(update={"engine": engine})
        command.append("--elsewhere")
    if is_left_to_first_job(config, on):
        command.append("--no-networks")
    text = tomli_w.dumps(config.dump())
    return call_trainer(command, text)


def is_left_to_first_job(config: Config, on: Runner = Runner.local) -> bool:
    """Whether networks cannot be tried here: without torch, or without the GPUs of Slurm's jobs."""
    if importlib.util.find_spec("torch") is None:
        return True
    wants_gpu = on is Runner.slurm and bool(config.slurm.resources("generalist").gpus)
    return wants_gpu and not visible_devices()


def _is_unchecked(run: RunDirectory, stale: list[Stage], on: Runner) -> bool:
    return _is_new(run, stale) and is_left_to_first_job(run.config, on)


def hand_over(
    run: RunDirectory, jobs: list[Job], stale: list[Stage], console: Console, aim: Aim
) -> None:
    """Submit to Slurm what is neither done nor queued."""
    began = time.monotonic()
    journal = read_journal(run.root)
    if journal.aim != aim.name:
        refuse_while_queued(run)
        journal = Journal(aim=aim.name)
    journal = slurm.settle(run, jobs, journal, lambda text: _say(text, console))
    queued = slurm.live(journal)
    if stale and queued:
        raise UserError(
            f"{run.root}: stages would be redone while {len(queued)} jobs of their old config are "
            f"queued; first: referral cancel {shlex.quote(str(run.root))}"
        )
    lay_out(run, jobs, stale, _is_unchecked(run, stale, Runner.slurm))
    save_environment(run.root)
    submitted = slurm.submit(run, jobs, journal)
    watch = f"referral status {shlex.quote(str(run.root))} --watch"
    if not submitted:
        console.say("every job that is left is queued already")
        console.say_next(watch)
        return
    rows = _table({"job": False, "id": False, "waits for": True})
    for batch, number in submitted:
        name = batch.name
        if batch.elements is not None:
            name += f" x {len(batch.jobs)}"
        rows.add_row(Text(name), number, Text(_shortened(batch.waits_for)))
    console.print(rows)
    console.say(f"{len(submitted)} submissions in {time.monotonic() - began:.1f} s")
    console.say_next(watch)


def refuse_while_queued(run: RunDirectory) -> None:
    """Raises UserError if jobs of the last launch wait or run in Slurm."""
    journal = read_journal(run.root)
    if journal.runner != "slurm":
        return
    queued = slurm.live(slurm.look(*launched(run), journal))
    if queued:
        raise UserError(
            f"{run.root} has {len(queued)} jobs of `{NAME} {journal.aim}` in Slurm "
            f"({_shortened(list(queued.values()))}); to go on otherwise, first: "
            f"{NAME} cancel {shlex.quote(str(run.root))}"
        )


def launched(run: RunDirectory) -> tuple[RunDirectory, list[Job]]:
    """The jobs of the last launch, which `status`, `retry` and `cancel` are about, and their run.

    Before there is any launch, those of the run.
    """
    aim = AIMS[read_journal(run.root).aim]
    return aim.run(run), plan(aim.run(run), stages=aim.stages(run))


def current_journal(run: RunDirectory, jobs: list[Job]) -> tuple[Journal, str]:
    """The last launch's journal, brought up to date by Slurm, and a doubt.

    The doubt says why Slurm did not bring it up to date. It is empty where there is none.
    """
    journal = read_journal(run.root)
    if journal.runner != "slurm":
        return journal, ""
    try:
        return slurm.look(run, jobs, journal), ""
    except UserError as error:
        return journal, f"only what the run directory says, for Slurm does not answer: {error}"


# What is printed


def show_plan(run: RunDirectory, jobs: list[Job], stale: list[Stage], console: Console) -> None:
    """The jobs, and below them the command that each would run now, longest chain first."""
    redone = {stage.place for stage in stale}
    left = {
        job.name: [stage for stage in job.stages if not stage.is_done or stage.place in redone]
        for job in jobs
    }
    rows = _table(
        {"job": False, "stages": True, "processes": True, "waits for": True, "state": True}
    )
    for job in jobs:
        stages = _shortened([stage.place for stage in job.stages])
        state = "to run" if left[job.name] else "done"
        cells = (job.name, stages, str(job.processes), _shortened(job.waits_for), state)
        rows.add_row(*(Text(cell) for cell in cells))
    console.print(rows)
    for job in sorted(jobs, key=lambda job: -job.chain):
        if left[job.name]:
            command = shlex.join(trainer_command(job, run, left[job.name], FAKE))
            console.print(Text(command), soft_wrap=True)


def show_submission(run: RunDirectory, jobs: list[Job]) -> None:
    """The sbatch commands, as a script that does the same by hand, and what they submit."""
    journal = slurm.look(run, jobs, read_journal(run.root))
    size = sbatch.MAX_ARRAY_SIZE
    if shutil.which("scontrol"):
        size = slurm.max_array_size()
    chosen = slurm.choose(run, jobs, journal)
    print(f"# site file: {slurm.site_file(run.root) or 'none'}")
    print(sbatch.shell_script(run, jobs, chosen, slurm.live(journal), size))
    print(f"\n# {sbatch.SCRIPT}:\n{sbatch.SCRIPT.read_text()}", end="")


def _table(columns: dict[str, bool]) -> Table:
    """A table whose columns are wrapped where they say True."""
    rows = Table(box=None, pad_edge=False, header_style="bold")
    for column, wraps in columns.items():
        rows.add_column(column, overflow="fold", no_wrap=not wraps)
    return rows


def _shortened(names: Sequence[str], most: int = 4) -> str:
    text = ", ".join(names[:most])
    if len(names) > most:
        text += f" and {len(names) - most} more"
    return text


def _say(text: str, console: Console | None = None) -> None:
    (console or wide_console()).say(text)


def _config(path: Path | None, root: Path, overrides: list[str]) -> Config:
    if path is None and not (root / "config.toml").is_file():
        raise UserError(f"{root} is not a run yet; name the config that it is to be made of")
    return load_config(path or root / "config.toml", overrides)


def named_code(path: Path | None, overrides: list[str]) -> list[Code]:
    """What the user names to be executed: in the config that it gave, or by --set."""
    if path is not None:
        return code_in(absolute(load_config(path, overrides)))
    values: dict = {}
    for override in overrides:
        apply_override(values, override)
    return [code for key, value in flat(values).items() for code in code_of_key(key, value)]


def _config_as_advised(path: Path | None, root: Path, overrides: list[str]) -> Config:
    """The config that goes on with the best lever of RUN's advice."""
    if not (root / "config.toml").is_file():
        raise UserError(
            f"{root} is not a run yet; first: {NAME} advise CONFIG.toml --run "
            f"{shlex.quote(str(root))}"
        )
    config = config_before(root) if path is None else absolute(load_config(path))
    lever, advised = config_as_advised(RunDirectory(root, config))
    said = f"as advised: {LEVERS[lever].what}"
    if lost := [name for name in config.students if name not in advised.students]:
        said += f"; without the students that this leaves no teacher for: {', '.join(lost)}"
    _say(said)
    return load_config(None, overrides, advised.dump())


def complete() -> int:
    """Print the words that a shell asks for."""
    from typer.completion import (
        completion_init,  # pyright: ignore[reportPrivateImportUsage]  # it has no other door
    )

    completion_init()
    get_command(app).main(prog_name=NAME)  # it exits
    return 0


def main() -> int:
    """Run the command of sys.argv.  Returns its exit code."""
    if COMPLETE in os.environ:
        return complete()
    arguments = sys.argv[1:]
    return answer(lambda: call(app, NAME, arguments), paths_among(arguments))


if __name__ == "__main__":
    sys.exit(main())
