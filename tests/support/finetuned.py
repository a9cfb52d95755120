"""A whole run on a trunk of timm's, in a Python that has timm and torchvision: tests start this.

    python finetuned.py KIND DIRECTORY

Writes someone's checkpoint as Hugging Face's hub has it, runs every stage from it, exports the run
with ONNX, and prints what a test compares as one JSON object.
"""

import json
import sys
from pathlib import Path

import numpy as np
import timm
import torch
from running import run_all
from safetensors.torch import load_file, save_file
from toy import NUM_CLASSES, images, toy_config, write_toy

from ensemble import SpecialistEnsemble
from networks import load_classifier
from pipeline.store import read_json
from trainer.__main__ import main

VIT = {"img_size": 8, "patch_size": 2, "embed_dim": 24, "depth": 3, "num_heads": 3}
RESNET = {"channels": [8, 8, 12, 16]}
MIXED = ("train.mixup=0.2", "train.cutmix=1.0", "train.label_smoothing=0.1")
CROPS = ("data.augment=rrc", "data.augment_options={flip=0, scale=[0.6, 1.0]}")
# kind -> timm's name, its options, the block that is frozen, settings of the run
KINDS = {
    "vit": (
        "vit_tiny_patch16_224",
        VIT,
        "trunk.blocks.0",
        ("specialists.kind=branch", "specialists.blocks=1", "specialists.views=1", *CROPS),
    ),
    "resnet": (
        "resnet18",
        RESNET,
        "trunk.layer1.0",
        ("specialists.trainable=last-2-blocks", *MIXED),
    ),
}


def write_checkpoint(name: str, options: dict, directory: Path) -> dict:
    """Of another label set, as timm's own repositories on the hub look. Its tensors."""
    torch.manual_seed(0)
    theirs = timm.create_model(name, in_chans=1, num_classes=11, **options)
    directory.mkdir()
    save_file(theirs.state_dict(), directory / "model.safetensors")
    described = {"architecture": name, "pretrained_cfg": {"mean": [0.4], "std": [0.2]}}
    (directory / "config.json").write_text(json.dumps(described))
    return theirs.state_dict()


def finetuned(kind: str, here: Path) -> dict:
    name, options, frozen, settings = KINDS[kind]
    theirs = write_checkpoint(name, options, here / "hub")
    trainable = "last-2-blocks" if kind == "vit" else "all"
    config = toy_config(
        write_toy(here / "data"),
        f"model.name=timm:{name}",
        f"generalist.from={here / 'hub'}",
        "generalist.head=new",
        f"train.trainable={trainable}",
        "train.layer_decay=0.8",
        "controls.enabled=false",
        "data.mean=[0.4]",
        "data.std=[0.2]",
        *settings,
    )
    # depth and width of [model] are no options of timm's
    model = config.model.model_copy(update={"options": options, "width": None, "depth": None})
    run = run_all(here / "run", config.model_copy(update={"model": model}))
    assert main(["export", str(run.root), "--to", str(here / "out"), "--programs", "--onnx"]) == 0
    generalist = load_classifier(run.generalist.path("model.json").parent)
    kept = [key for key in theirs if f"trunk.{key}".startswith(f"{frozen}.")]
    state = generalist.state_dict()
    raw = torch.from_numpy(images(np.arange(NUM_CLASSES), 7)[:, None])
    inside = SpecialistEnsemble.load(run.root).probabilities(raw)
    outside = SpecialistEnsemble.load(here / "out").probabilities(raw)
    return {
        "unmoved": all(torch.equal(state[f"trunk.{key}"], theirs[key]) for key in kept),
        "frozen_tensors": len(kept),
        "head_rows": len(state["head.weight"]),
        "stages": [stage.place for stage in run.stages if stage.is_done],
        "rows": sorted(read_json(run.root / "results.json")),
        "bundle": float((inside - outside).abs().max()),
        "differences": read_json(here / "out" / "export.json")["largest_difference"],
        "branch_tensors": branch_tensors(run.root) if kind == "vit" else [],
        "report": (run.root / "report.html").is_file(),
    }


def branch_tensors(root: Path) -> list[str]:
    """Names of what the first branch that is kept has of its own."""
    files = sorted(root.glob("specialists/*/model.safetensors"))
    return sorted(load_file(files[0]))


if __name__ == "__main__":
    print(json.dumps(finetuned(sys.argv[1], Path(sys.argv[2]))))
