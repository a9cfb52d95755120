"""An ensemble as one program where most specialists and patterns of classes have no mass."""

import pytest
import torch

from clustering.groups import ClassGroups
from ensemble import EnsembleProgram, SpecialistEnsemble
from networks import InputSpec, ModelSpec, build_classifier, specialise

CLASSES, SPECIALISTS = 160, 16


@pytest.fixture(scope="module")
def ensemble():
    """A function of the gate's n: confident networks (.82 on average) that disagree."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        spec = ModelSpec("mlp", CLASSES, InputSpec((1, 6, 6)), dict(width=24, depth=1))
        generalist = build_classifier(spec).eval()
        with torch.no_grad():
            generalist.head.weight.mul_(100)
        parts = [*torch.randperm(CLASSES).split(20), *torch.randperm(CLASSES).split(20)]
        groups = ClassGroups([part.numpy() for part in parts], CLASSES)
        specialists = {}
        for m, classes in enumerate(groups.members):
            specialists[m] = specialise(generalist, classes.tolist()).eval()
            with torch.no_grad():
                for parameter in specialists[m].head.parameters():
                    parameter.add_(0.5 * torch.randn(parameter.shape))
    weights = [1.0] + [2.0] * SPECIALISTS

    def make(n):
        return SpecialistEnsemble(generalist, specialists, groups, gate=n, weights=weights)

    return make


@pytest.mark.parametrize("n, most_active", [(1, 0.15), (3, 0.7), (8, 0.7)])
def test_the_program_equals_the_ensemble_where_few_of_many_specialists_are_active(
    ensemble, n, most_active
):
    rng = torch.Generator().manual_seed(n)
    raw = torch.randint(0, 256, (256, 1, 6, 6), dtype=torch.uint8, generator=rng)
    expected = ensemble(n).forward_with_details(raw)
    assert 0 < expected.active.float().mean() < most_active
    for portable in (False, True):
        with torch.no_grad():
            q = EnsembleProgram(ensemble(n), portable)(raw)
        torch.testing.assert_close(q, expected.q, rtol=0, atol=1e-5)
