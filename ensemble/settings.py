"""ensemble.json: how the networks of a run directory or an exported bundle are joined."""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from networks.integrity import read_values
from networks.spec import MOST_MEMBERS
from networks.temporaries import appearing

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Index = Annotated[int, Field(ge=0)]
SCHEMA = 1
SETTINGS = "ensemble.json"


@dataclass
class EnsembleSettings:
    """The contents of ensemble.json.  The defaults are those of a run that has none yet.

    kind: "specialists", "deep" for networks of one label set that are averaged, or "shortlist" for
    further networks that are asked about the generalist's likeliest classes.
    members: how many networks a deep ensemble or a shortlist's has.
    order: of the generalised mean that joins them. None is the kind's own.
    shortlist: how many classes the further networks are asked about, or the specialists. Of these
    None means every class.
    gate, max_specialists, combine, temperatures, weights: as in SpecialistEnsemble.
    skipped: groups that have no specialist on purpose.
    missing: groups whose specialist failed.
    shared: {"m": names of the tensors that specialist m's file leaves out, since they are the
    generalist's}.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True, allow_inf_nan=False)

    kind: Literal["specialists", "deep", "shortlist"] = "specialists"
    members: Annotated[int, Field(ge=1, le=MOST_MEMBERS)] = 1
    order: float | None = None
    shortlist: Count | None = None
    gate: Count = 1
    max_specialists: Count | None = None
    combine: str = "kl"
    temperatures: list[Positive] | None = None
    weights: list[Annotated[float, Field(ge=0)]] | None = None
    skipped: list[Index] = field(default_factory=list)
    missing: list[Index] = field(default_factory=list)
    shared: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def load(cls, root: Path) -> "EnsembleSettings":
        """What `root`/ensemble.json says. The defaults where there is none.

        Raises ValueError, naming the file, for one that cannot be read and for another schema.
        """
        path = root / SETTINGS
        if not path.is_file():
            return cls()
        content = read_values(path)
        schema = content.get("schema") if isinstance(content, dict) else None
        if schema != SCHEMA:
            raise ValueError(
                f"{path} has schema {schema!r}; this version reads {SCHEMA}: "
                "export it again with this version"
            )
        try:
            return FORM.validate_json(json.dumps(content))  # strict, but a table is one
        except ValidationError as mistakes:
            first = mistakes.errors(include_url=False, include_input=False)[0]
            key = ".".join(map(str, first["loc"]))
            raise ValueError(f"{path} is damaged: {key}: {first['msg']}") from None

    def save(self, root: Path) -> None:
        """Write `root`/ensemble.json with the keys of its kind.  It appears whole or never."""
        content: dict[str, object] = {"schema": SCHEMA}
        content |= {name: getattr(self, name) for name in self._keys()}
        text = json.dumps(content, indent=1, allow_nan=False) + "\n"
        with appearing(root / SETTINGS) as unfinished:
            unfinished.write_text(text, encoding="utf-8")

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


FORM = TypeAdapter(EnsembleSettings)


def member_folder(root: Path, index: int) -> Path:
    """Where a run or a bundle has the network of that index. The first is its generalist."""
    if index == 0:
        return root / "generalist"
    return root / "members" / f"{index:03d}"
