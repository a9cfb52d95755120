"""Flip single bits in every kind of file that a run keeps, and let the plain command go on.

    python tests/trust/bits.py [FLIPS] [--first NUMBER] [--seed SEED]

Every other flip is in a run of branches, which has features instead of routed samples.
What reads the file is done again: all stages behind the one that made it.  The run ends with the
figures of the undisturbed one, or with a line that names the file. What the line says to remove is
removed, and the plain command ends with these figures then.  Shards have no second copy: they are
put back.
"""

from __future__ import annotations

import random
import re
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from small import (  # noqa: E402
    Asked,
    Count,
    Outcome,
    asked,
    command,
    finished,
    in_child,
    judge,
    run_at,
    small_config,
    workshop,
)

from pipeline.config import Config  # noqa: E402
from pipeline.graph import RunDirectory  # noqa: E402
from pipeline.store import Stage  # noqa: E402

# Kind of file -> (where it lies, the stages that are done before it is read again).
IN_RUN = {
    "decoded inputs": "cache/*.npy",
    "their header": "cache/*.json",
    "a network's weights": "generalist/attempts/*/model.safetensors",
    "a network's form": "generalist/attempts/*/model.json",
    "a specialist's weights": "specialists/000/attempts/*/model.safetensors",
    "a training's summary": "specialists/001/attempts/*/summary.json",
    "statistics": "clusters/statistics/attempts/*/statistics.npz",
    "groups": "clusters/attempts/*/groups.json",
    "routed samples": "routed/attempts/*/000/ids.npy",
    "their header ": "routed/attempts/*/000/routed.json",
    "fitted settings": "ensemble/attempts/*/ensemble.json",
    "published settings": "ensemble.json",
    "stored targets": "targets/*/attempts/*/train/*.bin",
    "where they begin": "targets/*/attempts/*/train/starts.npy",
    "what they are of": "targets/*/attempts/*/train/answers.json",
    "a student's weights": "students/main/attempts/*/model.safetensors",
    "features": "features/attempts/*/train/*.npy",
    "what they are of ": "features/attempts/*/summary.json",
    "predictions": "evaluation/attempts/*/ensemble.npz",
    "figures": "evaluation/attempts/*/generalist.json",
    "results": "results.json",
    "a newest checkpoint": "generalist/checkpoints/step-00000030/state.pt",
    "its marker": "generalist/checkpoints/step-00000030/COMPLETE",
    "an older checkpoint": "generalist/checkpoints/step-00000020/state.pt",
    "DONE": "generalist/DONE",
    "KEY": "generalist/KEY",
    "the config": "config.toml",
}
OF_DATA = {
    "a shard": "train-*.tar",
    "its index": "train-*.tar.index.npz",
    "labels": "train.labels-*.npy",
    "a manifest": "manifest.json",
}


# Kind of run -> its settings.
FORMS = {"copies": (), "branches": ("specialists.kind=branch",)}


class Clean:
    """An undisturbed run: its config, its figures, and the kinds of file that it has."""

    def __init__(self, root: Path, data: Path, *overrides: str):
        self.config = small_config(data, 'data.cache="decoded"', "train.keep=3", *overrides)
        self.figures = finished(root, self.config)
        self.kinds = [kind for kind in IN_RUN if any(root.glob(IN_RUN[kind]))] + list(OF_DATA)


def main(given: Asked) -> int:
    count = Count("bit flips", given)
    with workshop() as (place, data):
        runs = {form: Clean(place / form, data, *keys) for form, keys in FORMS.items()}
        shutil.copytree(data, place / "good data")
        for trial in given.trials:
            rng = random.Random(f"{given.seed} {trial}")
            form = list(FORMS)[trial % len(FORMS)]
            config, expected = runs[form].config, runs[form].figures
            kinds = runs[form].kinds
            random.Random(given.seed).shuffle(kinds)
            kind = kinds[trial // len(FORMS) % len(kinds)]
            root = place / "run"
            shutil.copytree(place / form, root, symlinks=True)
            path, bit = victim(root, data, kind, rng)
            forget_behind(run_at(root, config), kind, path)
            flip(path, bit)
            outcome = in_child(partial(command, root, config))
            again = partial(helped, outcome, root, config, partial(put_back, place, data))
            said = f"{trial}: {form}, {kind}, bit {bit} of {path.relative_to(place)}"
            if outcome.is_one_line and not names(outcome, path):
                count.add("stuck", said, f"the file is not named: {outcome.text}")
            else:
                judge(count, said, outcome, root, expected, again)
            shutil.rmtree(root)
            put_back(place, data)
    return count.report()


def victim(root: Path, data: Path, kind: str, rng: random.Random) -> tuple[Path, int]:
    """(a file of a kind, one of its bits)."""
    directory, pattern = (root, IN_RUN[kind]) if kind in IN_RUN else (data, OF_DATA[kind])
    path = rng.choice(sorted(path for path in directory.glob(pattern) if path.stat().st_size))
    return path, rng.randrange(8 * path.stat().st_size)


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def forget_behind(run: RunDirectory, kind: str, path: Path) -> None:
    """Have all stages done again that read what the flipped file holds."""
    if kind in OF_DATA or kind in ("decoded inputs", "their header"):
        forget(run.stages)
        return
    owner = owner_of(run, path)
    if owner is None:
        forget([run.evaluate, run.report])
    elif "checkpoint" in kind or kind == "its marker":
        (owner.directory / "DONE").unlink()
        forget(behind(run, owner))
    elif kind not in ("DONE", "KEY"):
        forget(behind(run, owner))


def forget(stages: list[Stage]) -> None:
    for stage in stages:
        stage.clear()


def owner_of(run: RunDirectory, path: Path) -> Stage | None:
    """The stage in whose directory a file lies."""
    owners = [stage for stage in run.stages if stage.directory in path.parents]
    return max(owners, key=lambda stage: len(stage.place), default=None)


def behind(run: RunDirectory, stage: Stage) -> list[Stage]:
    """Those that wait for it, through others or directly."""
    found: list[Stage] = []
    for other in run.stages:
        inputs = {each.place for each in other.inputs}
        if inputs & {stage.place, *(each.place for each in found)}:
            found.append(other)
    return found


def names(outcome: Outcome, path: Path) -> bool:
    """Whether a line names the file, or what it is of: its directory, its shard, its stage."""
    known = [path.name, str(path.parent), path.name.partition(".tar")[0]]
    if path.name in ("KEY", "DONE"):
        known = [str(path), f"redone (their KEY or DONE says so): {path.parent.name}"]
    return any(name in outcome.text for name in known)


def helped(outcome: Outcome, root: Path, config: Config, restore: Callable[[], None]) -> Outcome:
    """The plain command once what the line says is done."""
    line = " ".join(outcome.errors)
    for target in re.findall(r"remove (/\S+?)(?: and (\S+?))?[,;]? ", line.replace(":", " ")):
        for path in map(Path, filter(None, target)):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    for path in re.findall(r"error: (\S+) is damaged .*; restore it, or remove it", line):
        Path(path).unlink(missing_ok=True)
    if "remove that directory" in line:
        for path in root.glob("*/checkpoints"):
            shutil.rmtree(path)
    restore()
    force = "--force" in line
    if (root / "config.toml").exists() and "config.toml" in line:
        (root / "config.toml").unlink()
    went = in_child(partial(command, root, config, force=force))
    if went.is_one_line and "--force" in went.text:  # begun under what was damaged then
        went = in_child(partial(command, root, config, force=True))
    return went


def put_back(place: Path, data: Path) -> None:
    """The shards as they were."""
    for path in (place / "good data").iterdir():
        shutil.copy2(path, data / path.name)


if __name__ == "__main__":
    sys.exit(main(asked(200)))
