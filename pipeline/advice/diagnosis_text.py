"""What a diagnosis says, one plain sentence each, in the trainer's log and on the terminal."""

from __future__ import annotations

from ..results import percent
from ..results.forecasts import captured_text

# What a state is called, and what follows from it.
_STATES = {
    "capacity": (
        "The generalist is short of capacity: it errs about as often on train as on val. "
        "Specialists, branches or a wider network add some."
    ),
    "data": (
        "The generalist is short of data: it knows train much better than val. A second "
        "generalist usually gives more than specialists here. `referral advise` measures which."
    ),
    "steps": (
        "The generalist is not trained long enough: its loss still fell before its learning rate "
        "went down. Train it longer before you pay for specialists."
    ),
    "none": "Neither capacity, data nor steps stand out as what the generalist is short of.",
}
LITTLE = 0.5  # of the errors inside groups: less is worth a word


def diagnosis_lines(diagnosis: dict) -> list[str]:
    """The sentences of diagnosis.json."""
    return [
        *_fit(diagnosis),
        *_training(diagnosis),
        *_state(diagnosis),
        *_groups(diagnosis),
        *_among(diagnosis),
        *_calibration(diagnosis),
    ]


def _with_se(mean: dict, digits: int = 1) -> str:
    """81.3 % (± 0.6)"""
    return f"{percent(mean['value'], digits)} (± {100 * mean['se']:.{digits}f})"


def _fit(diagnosis: dict) -> list[str]:
    train, val, gap = diagnosis["train"], diagnosis["val"], diagnosis["gap"]
    lines = [
        f"The generalist is right on {_with_se(train['top1'])} of {train['n']:,} examples of train "
        f"and on {_with_se(val['top1'])} of {val['n']:,} of val, a difference of "
        f"{100 * gap['top1']['value']:.1f} points (± {100 * gap['top1']['se']:.1f}); its loss is "
        f"{train['loss']['value']:.3f} and {val['loss']['value']:.3f} nats "
        f"(difference {gap['loss']['value']:.3f} ± {gap['loss']['se']:.3f})."
    ]
    augmented = diagnosis["augmented"]
    if augmented is not None:
        lines.append(
            f"Seen with data.augment = {augmented['augment']!r}, it is right on "
            f"{_with_se(augmented['train']['top1'])} of train and on "
            f"{_with_se(augmented['val']['top1'])} of val, with losses of "
            f"{augmented['train']['loss']['value']:.3f} and "
            f"{augmented['val']['loss']['value']:.3f} nats."
        )
    if not diagnosis["trained_here"]:
        lines.append(
            "It was given, so it is unknown which examples it learned from, and with which "
            "augmentation."
        )
    return lines


def _training(diagnosis: dict) -> list[str]:
    lines = []
    last, fall = diagnosis["last_fifth"], diagnosis["fall"]
    if last is not None:
        lines.append(
            f"Over the last fifth of its training the loss fell by {last['value']:.3f} nats "
            f"(± {last['se']:.3f})."
        )
    by_heart = diagnosis["state"] == "data"  # what train's loss then falls by
    if fall is not None and not (by_heart and fall["split"] == "train"):
        lines.append(
            f"Before its rate went down the loss on {fall['split']} fell as steps^-"
            f"{fall['exponent']:.2f} (± {fall['se']:.2f}): twice the steps would change it by "
            f"{-100 * fall['by_twice']:+.0f} %."
        )
    return lines


def _state(diagnosis: dict) -> list[str]:
    if not diagnosis["enough_errors"]:
        return [f"It makes {diagnosis['errors']} errors on val: too few to tell what it lacks."]
    return [_STATES[diagnosis["state"]]]


def _groups(diagnosis: dict) -> list[str]:
    groups = diagnosis["groups"]
    held = captured_text(groups["captured"], groups["chance"], groups["split"])
    lines = [f"Groups of classes {held}."]
    if groups["captured"] is not None and groups["captured"] < LITTLE:
        lines.append(
            "Specialists can correct no others, which speaks against them: try `referral advise`, "
            "or groups that overlap more."
        )
    return lines


def _among(diagnosis: dict) -> list[str]:
    shares = {k: share for k, share in diagnosis["among"].items() if share is not None}
    if not shares:
        return []
    counted = ", ".join(f"{k} likeliest in {percent(share, 1)}" for k, share in shares.items())
    return [f"Where it errs on val, the true class is among its {counted}."]


def _calibration(diagnosis: dict) -> list[str]:
    raw, scaled = diagnosis["calibration"]["raw"], diagnosis["calibration"]["scaled"]
    temperature = diagnosis["calibration"]["temperature"]
    return [
        f"It is {percent(raw['confidence'], 1)} sure of its answers on val, of which "
        f"{percent(raw['accuracy'], 1)} are right: an expected calibration error of "
        f"{raw['ece']:.3f}, and of {scaled['ece']:.3f} at the temperature {temperature:.2f}."
    ]
