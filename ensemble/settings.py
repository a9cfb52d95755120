"""ensemble.json: how the networks of a run directory or an exported bundle are joined."""

import json
import os
from dataclasses import dataclass, field, fields
from pathlib import Path

from networks import checksums
from networks.temporaries import temporary_beside

SCHEMA = 1
SETTINGS = "ensemble.json"


@dataclass
class EnsembleSettings:
    """The contents of ensemble.json.  The defaults are those of a run that has none yet.

    kind: "specialists", "deep" for networks of one label set that are averaged, or "shortlist" for
    further networks that are asked about the generalist's likeliest classes.
    members: how many networks a deep ensemble or a shortlist's has.
    order: of the generalised mean that joins them; None is the kind's own.
    shortlist: how many classes the further networks are asked about, or the specialists; of these
    None is every class.
    gate, max_specialists, combine, temperatures, weights: as SpecialistEnsemble has them.
    skipped: groups that have no specialist on purpose.
    missing: groups whose specialist failed.
    shared: {"m": names of the tensors that specialist m's file leaves out, since they are the
    generalist's}.
    """

    kind: str = "specialists"
    members: int = 1
    order: float | None = None
    shortlist: int | None = None
    gate: int = 1
    max_specialists: int | None = None
    combine: str = "kl"
    temperatures: list[float] | None = None
    weights: list[float] | None = None
    skipped: list[int] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)
    shared: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def load(cls, root: Path) -> "EnsembleSettings":
        """What `root`/ensemble.json says; the defaults where there is none.

        Raises ValueError, naming the file, for one that cannot be read and for another schema.
        """
        path = root / SETTINGS
        if not path.is_file():
            return cls()
        checksums.check(path)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: cannot be read: {error}") from None
        schema = content.get("schema") if isinstance(content, dict) else None
        if schema != SCHEMA:
            raise ValueError(
                f"{path} has schema {schema!r}; this version reads {SCHEMA}: "
                "export it again with this version"
            )
        known = {each.name for each in fields(cls)}
        return cls(**{name: value for name, value in content.items() if name in known})

    def save(self, root: Path) -> None:
        """Write `root`/ensemble.json with the keys of its kind.  It appears whole or never."""
        content: dict[str, object] = {"schema": SCHEMA}
        content |= {name: getattr(self, name) for name in self._keys()}
        unfinished = temporary_beside(root / SETTINGS)
        unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(unfinished, root / SETTINGS)

    def _keys(self) -> list[str]:
        """What a file of this kind says."""
        if self.kind == "specialists":
            others = {"kind", "members", "order"}
            if self.shortlist is None:
                others.add("shortlist")
            return [each.name for each in fields(self) if each.name not in others]
        names = ["kind", "members"]
        if self.order is not None:
            names.append("order")
        if self.kind == "shortlist":
            names += ["shortlist", "weights", "temperatures"]
        return names


def member_folder(root: Path, index: int) -> Path:
    """Where a run or a bundle has the network of that index; the first is its generalist."""
    if index == 0:
        return root / "generalist"
    return root / "members" / f"{index:03d}"
