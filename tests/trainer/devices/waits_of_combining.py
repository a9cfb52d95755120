"""How often the host waits while eq. 5 is solved for 4,096 rows and 16 specialists. Prints it."""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "support"))
from pretended import pretended  # noqa: E402

from clustering import ClassGroups  # noqa: E402
from ensemble import combine_kl  # noqa: E402

ROWS, CLASSES, SPECIALISTS, OWN = 4096, 320, 16, 30


def main() -> None:
    draw = torch.Generator().manual_seed(0)
    firsts = range(0, CLASSES, CLASSES // SPECIALISTS)
    members = [sorted((first + k) % CLASSES for k in range(OWN)) for first in firsts]
    groups = ClassGroups(members, CLASSES)
    p_general = torch.randn(ROWS, CLASSES, generator=draw).softmax(1)
    p_special = [torch.randn(ROWS, OWN + 1, generator=draw).softmax(1) for _ in members]
    active = torch.rand(ROWS, SPECIALISTS, generator=draw) < 0.2
    expected = combine_kl(p_general, p_special, groups, active)
    with pretended() as device:
        moved = [each.to(device.device) for each in p_special]
        arguments = (p_general.to(device.device), moved, groups, active.to(device.device))
        device.waits.clear()
        q = combine_kl(*arguments)
        waits = {f"{kind} {where}": times for (kind, where), times in device.waits.items()}
        torch.testing.assert_close(q.cpu(), expected, atol=1e-6, rtol=0)
    print(json.dumps(waits))


if __name__ == "__main__":
    main()
