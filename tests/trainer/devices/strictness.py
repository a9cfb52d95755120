"""What the pretended device refuses and counts, on hand-made cases. Asserts by itself."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "support"))
from pretended import NAME, HostCollective, Mismatch, Pretended  # noqa: E402


def refuses(error: type[Exception], call) -> None:
    try:
        call()
    except error:
        return
    raise AssertionError(f"no {error.__name__}")


def waits_of(device: Pretended, call) -> list[str]:
    """The kinds of what the host waits for, in order."""
    device.waits.clear()
    call()
    return [kind for (kind, _), times in device.waits.items() for _ in range(times)]


def main() -> None:
    with Pretended() as device:
        here = device.device
        x = torch.arange(6.0, device=here)
        assert x.device.type == NAME and x.cpu().device.type == "cpu"

        refuses(Mismatch, lambda: x + torch.ones(6))
        refuses(Mismatch, lambda: x[:2] @ torch.ones(2))
        refuses(Mismatch, lambda: torch.cat([x, torch.ones(1)]))
        refuses(Mismatch, lambda: torch.rand(2, device=here, generator=torch.Generator()))
        refuses(Mismatch, lambda: x.gather(0, torch.tensor([1])))
        refuses(TypeError, lambda: x.numpy())
        assert (x * torch.tensor(2.0)).tolist() == [0, 2, 4, 6, 8, 10]  # a number, as on a GPU

        assert waits_of(device, lambda: x.sum() * 2 + x.new_zeros(3).mean()) == []
        assert waits_of(device, lambda: x.sum().item()) == ["read"]
        assert waits_of(device, lambda: float(x[0])) == ["read"]
        assert waits_of(device, lambda: bool((x > 1).all())) == ["read"]
        assert waits_of(device, lambda: x.tolist()) == ["read"]
        assert waits_of(device, lambda: x.cpu()) == ["read"]
        assert waits_of(device, lambda: (x > 1).nonzero()) == ["read"]
        assert waits_of(device, lambda: x[x > 1]) == ["read"]
        assert waits_of(device, lambda: x.unique()) == ["read"]
        assert waits_of(device, lambda: x.masked_fill(x > 1, 0)) == []
        assert waits_of(device, lambda: x[torch.tensor([0, 1])]) == ["copy"]
        assert waits_of(device, lambda: torch.ones(3).to(here)) == ["copy"]
        assert waits_of(device, lambda: torch.tensor([1.0], device=here)) == ["copy"]
        assert waits_of(device, lambda: torch.ones(3).to(here, non_blocking=True)) == []
        assert waits_of(device, lambda: x.new_empty(3).copy_(torch.ones(3))) == ["copy"]

        view = x.view(2, 3)
        view[1] += 10
        assert x.tolist() == [0, 1, 2, 13, 14, 15]  # a view is the same memory
        check_training(here)
        check_collectives(here)


def check_training(here: torch.device) -> None:
    """A step on the device is a step on the CPU, bit for bit."""
    networks = []
    for place in (torch.device("cpu"), here):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).to(place)
        optimizer = torch.optim.AdamW(network.parameters(), fused=True)
        inputs = torch.arange(20.0).view(5, 4).to(place)
        for _ in range(3):
            nn.functional.cross_entropy(network(inputs), inputs[:, 0].long() % 3).backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.inference_mode():
            networks.append([network(inputs).cpu(), *(p.cpu() for p in network.parameters())])
        with torch.autocast(place.type, torch.bfloat16):
            assert network(inputs).dtype == torch.bfloat16
    for one, other in zip(*networks, strict=True):
        assert torch.equal(one, other)


def check_collectives(here: torch.device) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    refuses(HostCollective, lambda: dist.all_reduce(torch.ones(2)))
    total = torch.ones(2, device=here)
    dist.all_reduce(total)
    assert total.tolist() == [1, 1]
    others = dist.new_group([0], backend="gloo")
    dist.all_reduce(torch.ones(2), group=others)  # a group that was made for the host
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
