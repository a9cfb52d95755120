"""Stands for `python -P -m trainer`: touches the run directory as stages do, without torch.

behaviour.json beside RUN says per stage what goes wrong:
    {"specialists/001": {"exit": 1, "times": 1, "steps": 3}}
Every start and end of a stage is a line of calls.txt there.
"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

from pipeline.graph import open_run

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from advised import lever, made_up  # noqa: E402

ROW = {
    "n": 100,
    "top1": 0.6,
    "top5": 0.9,
    "nll": 1.2,
    "brier": 0.5,
    "ece": 0.05,
    "macro_top1": 0.6,
    "cost": {"seconds": 1.0, "examples_seen": 1000, "peak_memory_bytes": 1},
}

WIDER = lever("wider", 1.5, 1.0, 2.0, 2.0, 2.0, 1.8, model={"width": 24})
ADVICE = made_up(levers=[lever("average", 2.0, 0.7, 1.0, 2.0, 2.0, 2.0), WIDER])


def note(root: Path, *words) -> None:
    with open(root.parent / "calls.txt", "a") as file:
        file.write(" ".join(map(str, [*words, os.getpid(), f"{time.time():.3f}"])) + "\n")


def train(stage, behaviour: dict, root: Path) -> None:
    attempt = stage.begin()
    note(root, "begin", stage.place)
    metrics = attempt.path("metrics.jsonl")
    metrics.touch()
    attempt.publish("metrics.jsonl")
    steps = behaviour.get("steps", 2)
    for step in range(1, steps + 1):
        row = {
            "step": step,
            "steps": steps,
            "loss": 1.0,
            "lr": 1e-3,
            "examples": 8 * step,
            "seconds": 0.05 * step,
            "samples_per_s": 160.0,
        }
        with open(metrics, "a") as file:
            file.write(json.dumps(row) + "\n")
        time.sleep(0.05)
    tries = root.parent / f"tries-{stage.place.replace('/', '-')}.txt"
    tried = int(tries.read_text()) if tries.exists() else 0
    if tried < behaviour.get("times", 0):
        tries.write_text(str(tried + 1))
        print(behaviour.get("says", "it broke"), file=sys.stderr)
        note(root, "fail", stage.place)
        if behaviour.get("saves"):
            place = stage.directory / "checkpoints" / f"step-{tried + 1:08d}"
            place.mkdir(parents=True)
            (place / "COMPLETE").touch()
        sys.exit(behaviour["exit"])
    if stage.name == "report":
        better = {**ROW, "top1": 0.65, "nll": 1.1}
        results = {
            "generalist": ROW,
            "ensemble": better,
            "controls": {"control_wall": ROW},
            "students": {"main": ROW},
        }
        (root / "results.json").write_text(json.dumps(results))
    if stage.name == "diagnosis":
        content = {"state": "data", "sentences": ["more examples would help most"]}
        attempt.path("diagnosis.json").write_text(json.dumps(content))
    if stage.name == "advice":
        text = json.dumps({**ADVICE, **behaviour.get("advice", {})})
        attempt.path("advice.json").write_text(text)
        (root / "advice.json").write_text(text)
    attempt.finish()
    note(root, "end", stage.place)


def main() -> None:
    if sys.argv[1] == "check":
        config = sys.stdin.read()
        sys.exit("unlucky" in config and 2)
    if sys.argv[1] in ("shards", "export", "predict", "doctor", "compare"):
        print(" ".join(sys.argv[1:]))
        sys.exit(7 if "--seven" in sys.argv else 0)
    parser = argparse.ArgumentParser()
    parser.add_argument("stages", nargs="+")
    parser.add_argument("--run", type=Path)
    parser.add_argument("--index", type=int, nargs="+", default=[])
    parser.add_argument("--name", nargs="+", default=[])
    args = parser.parse_args()
    addresses = [None, *args.index, *args.name]
    run = open_run(args.run)
    stages = [
        stage for name in args.stages for stage in run.find(name) if stage.address in addresses
    ]
    behaviour = args.run.parent / "behaviour.json"
    behaviour = json.loads(behaviour.read_text()) if behaviour.exists() else {}
    if not behaviour.get("deaf"):

        def checkpoint(*_):
            note(args.run, "checkpoint", args.stages[0])
            sys.exit(75)

        signal.signal(signal.SIGTERM, checkpoint)
    else:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for stage in stages:
        if not stage.is_done:
            train(stage, behaviour.get(stage.place, {}), args.run)


if __name__ == "__main__":
    main()
