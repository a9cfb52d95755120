"""A small run, its plain command in a process of its own, and what came of it."""

from __future__ import annotations

import json
import os
import pkgutil
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from campaigns import Asked, asked  # noqa: E402, F401
from toy import toy_config, write_toy  # noqa: E402

import trainer.report
import trainer.stages
from launch.aims import RUN
from launch.plan import plan
from launch.prepare import check, lay_out, mend
from pipeline.config import Config
from pipeline.failures import answer
from pipeline.graph import RunDirectory

# What a forked command would import once more, in every trial.
for _package in (trainer.stages, trainer.report):
    for _module in pkgutil.walk_packages(_package.__path__, f"{_package.__name__}."):
        import_module(_module.name)
for _name in ("sympy", "sklearn.cluster", "sklearn.decomposition", "trainer.commands.export"):
    import_module(_name)

LIMIT_S = 600
SIZES = {"train": 20, "val": 10, "test": 6}


def small_data(directory: Path) -> Path:
    return write_toy(directory, SIZES)


def small_config(data: Path, *overrides: str) -> Config:
    """Two specialists, two students (one of them augmented, so that targets are stored twice)."""
    return toy_config(
        data,
        "controls.enabled=false",
        "clusters.num_groups=2",
        "train.steps=30",
        "train.checkpoint_every=10",
        "specialists.steps=6",
        "students.main.steps=6",
        *overrides,
    )


@dataclass(frozen=True)
class Outcome:
    """code: as the process returned it. negative: the signal that ended it.  text: all it said."""

    code: int
    text: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.text.splitlines() if line.startswith("error: ")]

    @property
    def is_traceback(self) -> bool:
        return self.code not in (0, 1, 2) or "Traceback" in self.text

    @property
    def is_one_line(self) -> bool:
        return self.code != 0 and not self.is_traceback and len(self.errors) > 0


def in_child(work: Callable[[], int], limit_s: float = LIMIT_S) -> Outcome:
    """Do `work` in a forked process, whose output is kept."""
    with tempfile.TemporaryFile() as output:
        child = fork(work, output.fileno())
        code = wait(child, limit_s)
        output.seek(0)
        return Outcome(code, output.read().decode("utf-8", "replace"))


def fork(work: Callable[[], int], output: int) -> int:
    """The process id of a child that does `work`."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        # pytest's own streams, which the child inherits, write elsewhere.
        sys.stdout = open(1, "w", closefd=False)
        sys.stderr = open(2, "w", closefd=False)
        code = work()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 70
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                pass
        os._exit(code)


def wait(child: int, limit_s: float = LIMIT_S) -> int:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -signal.SIGALRM  # it hung


def command(root: Path, config: Config, force: bool = False) -> int:
    """What `referral run [--force]` does, its jobs one after the other in this process."""
    return answer(lambda: _command(root, config, force), [root])


def _command(root: Path, config: Config, force: bool) -> int:
    import trainer.__main__ as trainer

    run, stale = check(config, root, force)
    jobs = plan(run, 1, RUN.stages(run))
    for line in mend(run, jobs):
        print(line)
    if stale or not all(job.is_done for job in jobs):
        root.mkdir(parents=True, exist_ok=True)
        lay_out(run, jobs, stale)
    for job in jobs:
        if job.is_done:
            continue
        code = trainer.main([*job.command(job.pending), "--run", str(root)])
        if code:
            return code
        if not job.is_done:
            print(f"error: {job.name} ended without being done")
            return 3
    return 0


def figures(root: Path) -> dict:
    """RUN/results.json without what depends on the machine."""
    return _same_everywhere(json.loads((root / "results.json").read_text()))


TIMES = {"cost", "seconds", "finished", "started", "elapsed_s", "softmax_ms", "latency_ms"}


def _same_everywhere(value: object) -> object:
    if isinstance(value, dict):
        return {key: _same_everywhere(each) for key, each in value.items() if key not in TIMES}
    if isinstance(value, list):
        return [_same_everywhere(each) for each in value]
    return value


def finished(root: Path, config: Config) -> dict:
    """The figures of an undisturbed run, made at `root`."""
    made = in_child(lambda: command(root, config))
    assert made.code == 0, made.text
    return figures(root)


def hidden(root: Path) -> list[Path]:
    """Temporaries that lie about, when no process writes."""
    return [path for path in root.rglob(".*") if path.name != ".lock"]


class Count:
    """How trials ended, and what each bad one said."""

    BAD = ("silent difference", "stuck", "traceback", "left behind", "executed")

    def __init__(self, name: str, given: Asked):
        self.name, self.given = name, given
        self.ends: Counter[str] = Counter()
        self.started = time.monotonic()

    def add(self, end: str, trial: str, text: str = "") -> None:
        self.ends[end] += 1
        if end in self.BAD:
            print(f"{self.name}: {trial}: {end}\n{text}", flush=True)

    def report(self) -> int:
        """Print the counts.  Returns the exit code."""
        listed = [f"{self.ends[end]} {end}" for end in self.BAD]
        listed += [f"{n} {end}" for end, n in sorted(self.ends.items()) if end not in self.BAD]
        seconds = time.monotonic() - self.started
        print(f"{self.name} {self.given}: {seconds:.0f} s: {', '.join(listed)}")
        return int(any(self.ends[end] for end in self.BAD))


def judge(
    count: Count,
    trial: str,
    outcome: Outcome,
    root: Path,
    expected: dict,
    again: Callable[[], Outcome],
) -> None:
    """Count how a trial ended: with the right figures, or with a line after which `again` helps."""
    said = outcome.text
    if outcome.is_one_line:
        outcome = again()
        said += outcome.text
        end = "went on after one line"
    else:
        end = "went on"
    if outcome.is_traceback:
        end = "traceback"
    elif outcome.code:
        end = "stuck"
    elif figures(root) != expected:
        end = "silent difference"
    elif hidden(root):
        end, said = "left behind", said + "\n".join(map(str, hidden(root)))
    count.add(end, trial, said)


@contextmanager
def workshop():
    """A directory with the toy's data, removed at the end."""
    place = Path(tempfile.mkdtemp(prefix="referral-trust-"))
    try:
        yield place, small_data(place / "data")
    finally:
        shutil.rmtree(place, ignore_errors=True)


def run_at(root: Path, config: Config) -> RunDirectory:
    return check(config, root, force=True)[0]
