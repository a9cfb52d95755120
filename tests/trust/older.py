"""Damage JSON files of a run that has no checksums, as older versions made it, and go on with it.

    python tests/trust/older.py [FILES] [--first NUMBER] [--seed SEED]

Nothing says then that a file is not what it was.  What reads it is done again: all stages behind
the one that made it, or a command that only reads.  It ends well, or in a line that names the file.
"""

from __future__ import annotations

import random
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from bits import behind, forget, owner_of  # noqa: E402
from mutations import damaged_file  # noqa: E402
from small import (  # noqa: E402
    Asked,
    Count,
    Outcome,
    asked,
    command,
    finished,
    in_child,
    run_at,
    small_config,
    workshop,
)

from pipeline.config import Config  # noqa: E402
from pipeline.failures import answer  # noqa: E402
from pipeline.store import read_json, write_json  # noqa: E402


def main(given: Asked) -> int:
    count = Count("damaged files of older runs", given)
    with workshop() as (place, data):
        config = small_config(data)
        finished(place / "whole", config)
        without_checksums(place / "whole")
        for trial in given.trials:
            rng = random.Random(f"{given.seed} {trial}")
            root = place / "run"
            shutil.copytree(place / "whole", root, symlinks=True)
            files = sorted(path for path in root.rglob("*.json") if path.is_file())
            path = rng.choice([each for each in files if not each.is_symlink()])
            run = run_at(root, config)
            owner = owner_of(run, path)
            what = damaged_file([path], rng)
            if owner is not None and rng.random() < 0.6:
                reader: Callable[[], int] = partial(command, root, config)
                forget(behind(run, owner))
                name = "run"
            else:
                name = rng.choice(list(READERS))
                reader = partial(answer, partial(READERS[name], root, config, place / "out"))
            end, said = verdict(in_child(reader), path)
            count.add(end, f"{trial}: {name}, {what}", said)
            shutil.rmtree(root)
            shutil.rmtree(place / "out", ignore_errors=True)
    return count.report()


def without_checksums(root: Path) -> None:
    for done in root.rglob("DONE"):
        content = read_json(done)
        content.pop("files", None)
        done.unlink()
        write_json(done, content)


def verdict(outcome: Outcome, path: Path) -> tuple[str, str]:
    """(how a trial ended, what it said)."""
    if outcome.is_traceback:
        return "traceback", outcome.text
    if outcome.code and not outcome.errors:
        return "stuck", f"exit code {outcome.code} without a line: {outcome.text}"
    if outcome.code and not any(name in outcome.text for name in (path.name, str(path.parent))):
        return "stuck", f"no file is named: {outcome.text}"
    return ("one line" if outcome.code else "went on"), outcome.text


def by_trainer(words: list[str]) -> int:
    import trainer.__main__ as trainer

    return trainer.main(words)


def by_launcher(words: list[str]) -> int:
    import launch.cli

    sys.argv = ["referral", *words]
    return launch.cli.main()


# Commands that read a finished run: (RUN, its config, a place to write to) -> exit code
READERS: dict[str, Callable[[Path, Config, Path], int]] = {
    "status": lambda root, config, out: by_launcher(["status", str(root)]),
    "status --json": lambda root, config, out: by_launcher(["status", "--json", str(root)]),
    "compare": lambda root, config, out: by_launcher(["compare", str(root)]),
    "doctor": lambda root, config, out: by_trainer(["doctor", "--run", str(root)]),
    "export": lambda root, config, out: by_trainer(["export", str(root), "--to", str(out)]),
    "predict": lambda root, config, out: by_trainer(["predict", str(root), config.data.test]),
    "evaluate": lambda root, config, out: by_trainer(
        ["evaluate-data", str(root), config.data.test]
    ),
    "student": lambda root, config, out: by_trainer(
        ["predict", str(root), config.data.test, "--student", "main"]
    ),
}


if __name__ == "__main__":
    sys.exit(main(asked(200)))
