"""Which program fits an ensemble: of copies or branches, asked about all classes or a shortlist."""

from torch import nn

from networks import Branch

from .branch_program import BranchProgram
from .export import EnsembleProgram
from .shortlist_programs import BranchesOnShortlist, CopiesOnShortlist
from .specialist_ensemble import SpecialistEnsemble


def ensemble_program(ensemble: SpecialistEnsemble, portable: bool = False) -> nn.Module:
    """The program that fits the ensemble's specialists: BranchProgram of branches alone.

    Raises ValueError where there is none, as for copies and branches in one ensemble.
    """
    kinds = {isinstance(ensemble.specialists[m], Branch) for m in ensemble.specialists}
    if len(kinds) > 1:
        raise ValueError("copies and branches in one ensemble have no program; export the bundle")
    if kinds == {True}:
        if ensemble.shortlist is None:
            return BranchProgram(ensemble, portable)
        return BranchesOnShortlist(ensemble, portable)
    if ensemble.shortlist is None:
        return EnsembleProgram(ensemble, portable)
    return CopiesOnShortlist(ensemble, portable)
