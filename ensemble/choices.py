"""The combiners by name.  Importing this module imports nothing heavy: login nodes read the table.

A new combiner is one row here and one function with the signature of `Combiner`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Protocol, cast

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from clustering.groups import ClassGroups

    from .predictions import SpecialistInput

__all__ = ["COMBINERS", "COMBINER_ALIASES", "MEANS", "Combiner", "combiner"]

# Name -> "module:function".
COMBINERS: dict[str, str] = {
    "kl": "ensemble.combine:combine_kl",
    "reverse_kl": "ensemble.pooling:reverse_kl",
    "arithmetic": "ensemble.pooling:arithmetic_mean",
    "log_ratio": "ensemble.pooling:log_ratio_product",
    "mixture": "ensemble.pooling:mixture_gating",
}
# Other names that a config may have for them.
COMBINER_ALIASES = {"mean": "arithmetic"}

# How networks of one label set are averaged: the order of a generalised mean.
MEANS: dict[str, float] = {"arithmetic": 1.0, "geometric": 0.0}


class Combiner(Protocol):
    """A function that makes one distribution of a generalist's and its specialists' predictions.

    Legend: B rows, C classes, M specialists, S_m the classes of group m.

    Parameters
    ----------
    p_general : Tensor [B, C]
        Probabilities.  Each row sums to 1.
    p_special : sequence of M entries
        Entry m is [B, |S_m| + 1].  Column j is class `groups.members[m][j]`. The dustbin is last.
        Or `(rows, [len(rows), |S_m| + 1])`, or None where no row is active for m.
    groups : ClassGroups
        The classes of each specialist.
    active : bool Tensor [B, M], optional
        Which specialists count in which row.  None is all.  Rows that are not active are not read.
    weights : [1 + M], optional
        How much each prediction counts, the generalist's first.  None means all ones.

    Returns
    -------
    Tensor [B, C]
        Probabilities in p_general's dtype and on its device, differentiable in the probabilities.
        A row without an active specialist is p_general's.

    Raises
    ------
    ValueError
        For shapes that disagree, and for rows that are not probabilities.
    """

    def __call__(
        self,
        p_general: Tensor,
        p_special: SpecialistInput,
        groups: ClassGroups,
        active: Tensor | None = None,
        weights: Tensor | Sequence[float] | None = None,
    ) -> Tensor: ...


def combiner(name: str) -> Combiner:
    """The combiner of that name.  Imports its module, and torch with it.

    Parameters
    ----------
    name : str
        A key of `COMBINERS`.

    Returns
    -------
    Combiner

    Raises
    ------
    ValueError
        If the name is unknown.

    Examples
    --------
    >>> from ensemble import combiner
    >>> q = combiner("kl")(p_general, p_special, groups, active=active)  # doctest: +SKIP
    """
    check_combiner(name)
    module, _, function = COMBINERS[name].partition(":")
    return cast(Combiner, getattr(import_module(module), function))


def check_combiner(name: str) -> None:
    """ValueError, with the valid names, if `name` is unknown."""
    if name not in COMBINERS:
        raise ValueError(f"combine = {name!r} is unknown; it must be one of {', '.join(COMBINERS)}")
