"""Bundles that somebody damaged or forged, seeded, and what `referral predict` makes of them.

Bytes are flipped, files cut short, emptied or exchanged, and values of JSON files replaced by what
no version writes.  Half of the bundles keep their SHA256SUMS, which has to tell. The other half
have none, as older versions wrote them.  Every bundle ends in predictions or in one line, nothing
is executed, and with checksums no answer differs.  `make soak` does 1,200 of them.
"""

import contextlib
import io
import random
import shutil
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1] / "support"), str(Path(__file__).parents[2])]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from campaigns import asked  # noqa: E402
from mutations import damaged_file, files_beside  # noqa: E402

from ensemble import DeepEnsemble, ShortlistEnsemble, SpecialistEnsemble, export_bundle  # noqa: E402
from networks import (  # noqa: E402
    InputSpec,
    ModelSpec,
    branch_off,
    build_classifier,
    save_classifier,
    specialise,
)
from networks.integrity import CHECKSUMS, write_checksums  # noqa: E402
from trainer.__main__ import main as trainer_main  # noqa: E402

CLASSES = 6
GROUPS = [[0, 1, 2], [3, 4, 5]]
# Python's audit events of what would be somebody else's program.
EXECUTED = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.Popen",
    "pickle.find_class",
)
executed: list[str] = []


# Whole bundles


def network(builder: str, seed: int, **more: Any):
    torch.manual_seed(seed)
    rules = InputSpec(shape=(1, 8, 8), mean=(0.5,), std=(0.25,))
    options = {"width": 4, "depth": 2} | more.pop("options", {})
    return build_classifier(ModelSpec(builder, CLASSES, rules, options, **more)).eval()


def of_copies(root: Path) -> None:
    generalist = network("convnet", 0)
    special = {m: specialise(generalist, classes, "preserving") for m, classes in enumerate(GROUPS)}
    export_bundle(SpecialistEnsemble(generalist, special, groups()), root)


def of_branches(root: Path) -> None:
    generalist = network("mlp", 1)
    special = {m: branch_off(generalist, classes, 4, 1) for m, classes in enumerate(GROUPS)}
    export_bundle(SpecialistEnsemble(generalist, special, groups()), root)


def deep(root: Path) -> None:
    heads = {"kind": "heads", "count": 2, "blocks": 1}
    DeepEnsemble([network("mlp", 2), network("mlp", 3, members=heads)]).save(root)


def of_shortlist(root: Path) -> None:
    ShortlistEnsemble([network("convnet", 4), network("mlp", 5)], 3).save(root)


def groups():
    from clustering.groups import ClassGroups

    return ClassGroups(GROUPS, CLASSES)


BUNDLES: dict[str, Callable[[Path], None]] = {
    "copies": of_copies,
    "branches": of_branches,
    "deep": deep,
    "shortlist": of_shortlist,
}


def make(root: Path) -> dict[str, Path]:
    """One whole bundle of each kind, each with a student and its checksums, and the inputs."""
    bundles = {}
    for name, write in BUNDLES.items():
        bundles[name] = root / name
        bundles[name].mkdir(parents=True)
        write(bundles[name])
        save_classifier(network("mlp", 9), bundles[name] / "students" / "main")
        write_checksums(bundles[name])
    inputs = np.random.default_rng(0).integers(0, 256, (4, 1, 8, 8), dtype=np.uint8)
    np.save(root / "inputs.npy", inputs)
    return bundles


# What becomes of it


def predicted(bundle: Path, inputs: Path, student: bool) -> tuple[int | None, str, str]:
    """(exit code, output, errors) of `predict`. The code is None where it ends in a traceback."""
    words = ["predict", str(bundle), str(inputs), "--json"]
    words += ["--student", "main"] if student else []
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        with warnings.catch_warnings(action="ignore"):
            try:
                code: int | None = trainer_main(words)
            except BaseException:
                code = None
                traceback.print_exc()
    return code, out.getvalue(), err.getvalue()


def verdict(bundle: Path, inputs: Path, student: bool, whole: str, has_sums: bool) -> str:
    """ "" where all is as it should be, else what is not."""
    code, out, err = predicted(bundle, inputs, student)
    if code is None:
        return f"traceback: {err.strip().splitlines()[-1]}\n{err}"
    if code == 0:
        return f"another answer: {out[:200]}" if has_sums and out != whole else ""
    lines = err.strip().splitlines()
    if len([line for line in lines if line.startswith("error: ")]) != 1:
        return f"exit code {code} with {len(lines)} lines: {err[:500]}"
    if str(bundle) not in err and str(inputs) not in err:
        return f"no file is named: {err}"
    return ""


def note_executed(event: str, arguments: tuple) -> None:
    if event in EXECUTED:
        executed.append(f"{event} {arguments!r:.100}")


def check(number: int, root: Path, bundles: dict[str, Path], whole: dict) -> str:
    """Damage one bundle and predict with it. What is wrong with the outcome, "" if nothing."""
    chance = random.Random(number)
    name = chance.choice(list(bundles))
    student = chance.random() < 0.2
    bundle = root / f"mutated-{number}"
    shutil.copytree(bundles[name], bundle)
    has_sums = number % 2 == 0
    if not has_sums:
        (bundle / CHECKSUMS).unlink()
    what = damaged_file(files_beside(bundle / "ensemble.json"), chance)
    wrong = verdict(bundle, root / "inputs.npy", student, whole[name, student], has_sums)
    if executed:
        wrong += f" executed: {executed}"
        executed.clear()
    shutil.rmtree(bundle)
    who = "student" if student else "ensemble"
    return f"{number}: {who} of {name}, {what}: {wrong}" if wrong else ""


def campaign(numbers: range, root: Path) -> list[str]:
    """What went wrong with the bundles of these numbers."""
    bundles = make(root)
    inputs = root / "inputs.npy"
    whole = {}
    for name, bundle in bundles.items():
        for student in (False, True):
            code, out, err = predicted(bundle, inputs, student)
            assert code == 0, err
            whole[name, student] = out
    return [wrong for number in numbers if (wrong := check(number, root, bundles, whole))]


if __name__ == "__main__":
    given = asked(1200)
    torch.set_num_threads(1)
    sys.addaudithook(note_executed)
    with tempfile.TemporaryDirectory() as directory:
        failures = campaign(given.numbers, Path(directory))
    for failure in failures:
        print(failure)
    kinds = Counter(failure.split(": ")[2].split("\n")[0] for failure in failures)
    for kind in kinds.most_common():
        print(*kind)
    print(f"mutated bundles {given}: {len(failures)} wrong")
    sys.exit(bool(failures))
