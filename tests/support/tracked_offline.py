"""What Weights & Biases keeps of a stage and a report, offline. Prints it as JSON.

    tracked_offline.py DIRECTORY

A .wandb file is a log of LevelDB's form, of W&B's own messages:
https://github.com/google/leveldb/blob/main/doc/log_format.md
"""

import json
import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

from trainer.core.tracking import trackers

BLOCK, HEAD = 32768, 7  # bytes. The file begins with 7 of W&B's
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4
CONFIG = {"seed": 0, "train.steps": 20, "model.name": "mlp", "controls.enabled": False}
ROWS = {"ensemble": {"n": 10, "top1": 0.75, "nll": 1.5}, "student main": {"n": 10, "top1": 0.5}}


def messages(path: Path) -> Iterator[bytes]:
    content, place, whole = path.read_bytes(), HEAD, b""
    while place + HEAD <= len(content):
        left = BLOCK - place % BLOCK
        if left < HEAD:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + HEAD])
        part = content[place + HEAD : place + HEAD + length]
        place += HEAD + length
        whole = part if kind in (FULL, FIRST) else whole + part
        if kind in (FULL, LAST):
            yield whole


def kept(directory: Path) -> dict:
    from wandb.proto.wandb_internal_pb2 import Record

    result: dict = {"config": {}, "history": [], "summary": {}, "tables": []}
    for path in sorted(directory.glob("wandb/offline-run-*/*.wandb")):
        for message in messages(path):
            record = Record()
            record.ParseFromString(message)
            result["config"] |= values(record.run.config.update)
            result["config"] |= values(record.config.update)
            result["summary"] |= values(record.summary.update)
            if record.HasField("history"):
                result["history"].append(values(record.history.item))
            if record.HasField("run"):
                result["run"] = [record.run.run_group, record.run.display_name]
    for path in directory.glob("wandb/offline-run-*/files/media/table/*.table.json"):
        result["tables"].append(json.loads(path.read_text()))
    return result


def values(items) -> dict:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def main(root: str) -> None:
    os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    run = Path(root) / "mine"
    for stage in ("generalist", "report"):
        directory = run / stage
        directory.mkdir(parents=True)
        with trackers(["wandb"], directory, run, stage, CONFIG) as (tracker,):
            if stage == "generalist":
                for step in (10, 20):
                    tracker({"step": step, "loss": 1 / step})
                tracker({"step": 20, "val/top1": 0.5})
            else:
                tracker.table(ROWS)
    import wandb

    wandb.teardown()  # its own process, which writes the files, has ended
    print(json.dumps({stage: kept(run / stage) for stage in ("generalist", "report")}))


if __name__ == "__main__":
    main(sys.argv[1])
