"""Someone else's weights in a network of ours."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from networks import InputSpec, ModelSpec, adopt_weights, build_classifier


class Theirs(nn.Module):
    """A network as people have them: a body of some names, and `fc`."""

    def __init__(self, bias=True):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 4, 3), nn.Linear(4, 5, bias=bias)

    def features(self, x):
        return self.conv(x).relu().mean(dim=(2, 3))

    def forward(self, x):
        return self.fc(self.features(x))


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)

    forward = Theirs.features


def ours(classes=5):
    spec = ModelSpec("their:body", classes, InputSpec(shape=(1, 8, 8), mean=[0.5], std=[0.25]))
    return build_classifier(spec, {"their:body": lambda shape: Body()})


def wrapped(network, how):
    state = network.state_dict()
    if how == "module.":
        return {f"module.{name}": value for name, value in state.items()}
    return {how: state, "epoch": 3} if how else state


@pytest.mark.parametrize("how", ["", "state_dict", "model", "module."])
@pytest.mark.parametrize("bias", [True, False])
def test_the_same_logits_come_from_a_saved_state_dict(tmp_path, how, bias):
    theirs, mine = Theirs(bias), ours()
    torch.save(wrapped(theirs, how), tmp_path / "weights.pt")
    adopt_weights(mine, tmp_path / "weights.pt", "fc")
    raw = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    torch.testing.assert_close(mine(raw), theirs((raw / 255 - 0.5) / 0.25))


def test_the_same_logits_come_from_safetensors(tmp_path):
    theirs, mine = Theirs(), ours()
    save_file(theirs.state_dict(), tmp_path / "weights.safetensors")
    adopt_weights(mine, tmp_path / "weights.safetensors", "fc")
    torch.testing.assert_close(mine.head.weight, theirs.fc.weight)


class Evil:
    def __reduce__(self):
        return print, ("owned",)


@pytest.mark.parametrize(
    "content, head, message",
    [
        (Theirs().state_dict(), "classifier", "has no classifier.weight; its linear layers are fc"),
        ({**Theirs().state_dict(), "extra": torch.ones(1)}, "fc", "has unexpected trunk.extra"),
        ({"fc.weight": torch.ones(5, 4)}, "fc", "lacks trunk.conv.bias, trunk.conv.weight"),
        (
            {**Theirs().state_dict(), "fc.weight": torch.ones(7, 4)},
            "fc",
            r"head.weight is \[7, 4\], not \[5, 4\]",
        ),
        ([1, 2], "fc", "not a state dict"),
        (Evil(), "fc", "not a state dict of plain tensors"),
    ],
    ids=["head", "unexpected", "missing", "classes", "list", "code"],
)
def test_what_does_not_fit_is_one_clear_error(tmp_path, capsys, content, head, message):
    torch.save(content, tmp_path / "weights.pt")
    mine = ours()
    before = mine.head.weight.clone()
    with pytest.raises(ValueError, match=message):
        adopt_weights(mine, tmp_path / "weights.pt", head)
    assert torch.equal(mine.head.weight, before) and "owned" not in capsys.readouterr().out
