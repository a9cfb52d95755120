"""An ensemble as one program where most specialists and patterns of classes have no mass."""

import pytest
import torch

from clustering.groups import ClassGroups
from ensemble import EnsembleProgram, SpecialistEnsemble
from networks import InputSpec, ModelSpec, build_classifier, specialise

CLASSES, SPECIALISTS = 160, 16


@pytest.fixture(scope="module")
def ensemble():
    """Confident (the generalist gives its favourite .82 on average) and of different minds."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        spec = ModelSpec("mlp", CLASSES, InputSpec((1, 6, 6)), dict(width=24, depth=1))
        generalist = build_classifier(spec).eval()
        with torch.no_grad():
            generalist.head.weight.mul_(100)
        parts = [part.numpy() for _ in range(2) for part in torch.randperm(CLASSES).split(20)]
        groups = ClassGroups(parts, CLASSES)
        specialists = {}
        for m, classes in enumerate(groups.members):
            specialists[m] = specialise(generalist, classes.tolist()).eval()
            with torch.no_grad():
                for parameter in specialists[m].head.parameters():
                    parameter.add_(0.5 * torch.randn(parameter.shape))
    return lambda n: SpecialistEnsemble(
        generalist, specialists, groups, gate=n, weights=[1.0] + [2.0] * SPECIALISTS
    )


@pytest.mark.parametrize("n", [1, 3, 8])
def test_the_program_equals_the_ensemble_where_few_of_many_specialists_are_active(ensemble, n):
    raw = torch.randint(
        0, 256, (256, 1, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(n)
    )
    expected = ensemble(n).forward_with_details(raw)
    assert 0 < expected.active.float().mean() < (0.15 if n == 1 else 0.7)
    for portable in (False, True):
        with torch.no_grad():
            q = EnsembleProgram(ensemble(n), portable)(raw)
        torch.testing.assert_close(q, expected.q, rtol=0, atol=1e-5)
