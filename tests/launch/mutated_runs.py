"""Run directories that somebody damaged, seeded, and what the launcher's commands make of them.

Whatever the files of RUN say, `status`, `compare`, `cancel`, `retry` and `run` end in their answer
or in lines that name what is wrong. None is a traceback, and nobody is signalled.
`make soak` does 400 of them.
"""

import contextlib
import io
import json
import os
import random
import shutil
import sys
import tempfile
import traceback
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / "support"), str(Path(__file__).parents[2])]
sys.path.insert(0, str(Path(__file__).parent))

from campaigns import asked  # noqa: E402
from conftest import FAKE_TRAINER, Ward  # noqa: E402
from fake_trainer import ROW  # noqa: E402
from mutations import damaged_file, files_beside  # noqa: E402

import launch.cli  # noqa: E402
from launch.journal import JobRecord, Journal  # noqa: E402
from launch.plan import plan, save_graph  # noqa: E402

COMMANDS = [
    ["status"], ["status", "--json"], ["compare"], ["cancel"], ["retry"],
    ["run", "--dry-run", "--run"], ["report"],
]  # fmt: skip
CHOSEN = ("*.json", "*.toml", "DONE", "KEY", "metrics.jsonl", ".lock")


def finished(root: Path) -> Path:
    """A run with all that a finished one has, as far as the launcher reads it."""
    ward = Ward(root)
    del ward.values["students"]
    run = ward.run("controls.enabled=false", "clusters.num_groups=2")
    metrics = run.generalist.begin()
    row = {"step": 5, "steps": 9, "loss": 1.0, "seconds": 1.0, "val/top1": 0.5}
    metrics.path("metrics.jsonl").write_text(f"{json.dumps(row)}\n" * 3)
    metrics.finish()
    ward.finish(run.stages[1:])
    rows = {"generalist": ROW, "ensemble": {**ROW, "top1": 0.65}, "controls": {}, "students": {}}
    (run.root / "results.json").write_text(json.dumps(rows))
    jobs = {job.name: JobRecord("done", started=1.0, ended=2.0) for job in plan(run)}
    jobs["generalist"] = JobRecord("running", pid=2**22, born="0:1", started=1.0)
    Journal(jobs).save(run.root)
    save_graph(plan(run), run.root / "graph.json")
    (run.root / ".lock").write_text(f"process 1 on {os.uname().nodename}\n")
    return run.root


def referral(words: list[str]) -> tuple[int | None, str]:
    """(exit code, output) of a command in this process. The code is None after a traceback."""
    output, before = io.StringIO(), sys.argv
    sys.argv = ["referral", *words]
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            code: int | None = launch.cli.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        except BaseException:
            code = None
            traceback.print_exc()
    sys.argv = before
    return code, output.getvalue()


def check(number: int, whole: Path) -> str:
    """Damage a copy of the run and ask one command about it. What is wrong, "" if nothing."""
    chance = random.Random(number)
    saved = whole.with_name("saved")
    if not saved.exists():
        shutil.copytree(whole, saved, symlinks=True)
    shutil.rmtree(whole)
    shutil.copytree(saved, whole, symlinks=True)  # in its own place, as its config has it
    chosen = [path for path in files_beside(whole / "x") if any(map(path.match, CHOSEN))]
    what = damaged_file(chosen, chance)
    command = chance.choice(COMMANDS)
    code, output = referral([*command, str(whole)])
    if code is None:
        return f"{number}: {what}: {command}: {output[-1500:]}"
    if code and "error: " not in output and "Traceback" in output:
        return f"{number}: {what}: {command}: exit code {code}: {output[-1500:]}"
    return ""


def campaign(numbers: range, root: Path) -> list[str]:
    launch.cli.FAKE = FAKE_TRAINER
    killed: list[tuple] = []
    kill, os.kill = os.kill, lambda *words: killed.append(words)
    try:
        whole = finished(root)
        failures = [wrong for number in numbers if (wrong := check(number, whole))]
    finally:
        os.kill = kill
    return failures + [f"signalled: {words}" for words in killed]


if __name__ == "__main__":
    given = asked(400)
    os.environ["COLUMNS"] = "200"
    with tempfile.TemporaryDirectory() as directory:
        os.environ["XDG_STATE_HOME"] = directory
        wrong = campaign(given.numbers, Path(directory))
    print(*wrong, f"damaged runs {given}: {len(wrong)} wrong", sep="\n")
    sys.exit(bool(wrong))
