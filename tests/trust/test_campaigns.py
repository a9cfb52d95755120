"""A few repetitions of what `make soak` does for hours."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import bits
import clearing
import disks
import full_outputs
import older
import power
import strange_runs
import twins
from small import asked


@pytest.mark.slow
@pytest.mark.parametrize(
    "campaign, trials",
    [
        (clearing, 1),
        (power, 2),
        (bits, 2),
        (disks, 2),
        (older, 8),
        (twins, 3),
        (strange_runs, 8),
        (full_outputs, 5),
    ],
)
def test_a_few_trials_of_each_campaign_end_well(campaign, trials):
    assert campaign.main(asked(trials, argv=[])) == 0
