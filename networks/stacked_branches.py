"""Many branches as one product: their layers one behind the other, filled up to the largest.

M, B   branches. Rows of a batch for each of them
D, E   numbers that an embedding reads. Gives
K      classes of the largest branch. The columns of a smaller one are its classes, then padding
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F

from .branches import Branch


class StackedLinear(nn.Module):
    """M linear layers: [M, B, in] -> [M, B, out]."""

    def __init__(self, weight: Tensor, bias: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias[:, None], x, self.weight.transpose(1, 2))


class StackedBranches(nn.Module):
    """The corrections r of M branches, [M, B, K + 1], each on rows of its own. Dustbin last.

    The branches share the generalist and the number of their own blocks, and have one embedding's
    size.  Their blocks are in eval mode: batch norm keeps its statistics.

    classes: int64 [M, K], padded with 0.  valid: bool [M, K].
    """

    classes: Tensor
    valid: Tensor

    def __init__(self, branches: Sequence[Branch]):
        super().__init__()
        self.specs = [branch.spec for branch in branches]
        self.sizes = [len(branch.classes) for branch in branches]
        self.width = max(self.sizes)
        self.hidden = StackedLinear(
            torch.stack([branch.hidden.weight.detach() for branch in branches]),
            torch.stack([branch.hidden.bias.detach() for branch in branches]),
        )
        self.correction = StackedLinear(
            torch.stack([self._padded(branch.correction.weight) for branch in branches]),
            torch.stack([self._padded(branch.correction.bias) for branch in branches]),
        )
        classes = [
            F.pad(branch.classes, (0, self.width - len(branch.classes))) for branch in branches
        ]
        self.register_buffer("classes", torch.stack(classes), persistent=False)
        columns = torch.arange(self.width, device=self.classes.device)
        sizes = torch.tensor(self.sizes, device=self.classes.device)
        self.register_buffer("valid", columns < sizes[:, None], persistent=False)
        self._template = [copy.deepcopy(branches[0].blocks).eval()]  # in a list: no module of ours
        self.blocks = nn.ParameterDict()
        self._frozen: dict[str, Tensor] = {}
        if list(self._template[0].parameters()):
            parameters, _ = stack_module_state([branch.blocks for branch in branches])
            self.blocks.update({_key(name): nn.Parameter(p) for name, p in parameters.items()})
            self._frozen = dict(self._template[0].named_buffers())

    def _padded(self, rows: Tensor) -> Tensor:
        """[|S| + 1, ...] -> [K + 1, ...], the dustbin's row last."""
        rows = rows.detach()
        missing = rows.new_zeros(self.width + 1 - len(rows), *rows.shape[1:])
        return torch.cat([rows[:-1], missing, rows[-1:]])

    def forward(self, at_cut: Tensor, kept: Tensor | None = None) -> Tensor:
        """r [M, B, K + 1] of [M, B, ...].  kept: of dropout, what h is multiplied by, [M, B, D]."""
        h = self._through_blocks(at_cut).flatten(2)
        if kept is not None:
            h = h * kept
        return self.correction(F.relu(self.hidden(h)))

    def _through_blocks(self, at_cut: Tensor) -> Tensor:
        if not len(self.blocks):
            return at_cut
        template, frozen = self._template[0], self._frozen

        def run(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            return functional_call(template, parameters | frozen, (x,))

        parameters = {_name(key): parameter for key, parameter in self.blocks.items()}
        return vmap(run)(parameters, at_cut)

    def tensors(self, m: int) -> dict[str, Tensor]:
        """Branch m's own tensors by this module's names, views without the first axis."""
        return {name: parameter.detach()[m] for name, parameter in self.named_parameters()}

    @torch.no_grad()
    def put(self, m: int, tensors: dict[str, Tensor]) -> None:
        """Set what `tensors` gave, perhaps of a stack that was filled up to another width."""
        for name, parameter in self.named_parameters():
            parameter[m] = fitted(name, tensors[name].to(parameter), self.sizes[m], self.width)

    def branch(self, m: int, tensors: dict[str, Tensor] | None = None) -> Branch:
        """Branch m as a network of its own. tensors: of `tensors`, by default those of now."""
        tensors = self.tensors(m) if tensors is None else tensors
        blocks = copy.deepcopy(self._template[0])
        blocks.load_state_dict(
            {
                _name(name.removeprefix("blocks.")): t
                for name, t in tensors.items()
                if "blocks." in name
            },
            strict=False,
        )
        made = Branch(self.specs[m], blocks)
        size = self.sizes[m]
        with torch.no_grad():
            made.hidden.weight.copy_(tensors["hidden.weight"])
            made.hidden.bias.copy_(tensors["hidden.bias"])
            made.correction.weight.copy_(_trimmed(tensors["correction.weight"], size))
            made.correction.bias.copy_(_trimmed(tensors["correction.bias"], size))
        return made.to(self.hidden.weight).eval()


def fitted(name: str, tensor: Tensor, size: int, width: int) -> Tensor:
    """A branch's tensor of a stack of another width, for one that is filled up to `width`."""
    if not name.startswith("correction."):
        return tensor
    own = _trimmed(tensor, size)
    padding = own.new_zeros(width - size, *own.shape[1:])
    return torch.cat([own[:-1], padding, own[-1:]])


def _trimmed(rows: Tensor, size: int) -> Tensor:
    """[K + 1, ...] -> [|S| + 1, ...]."""
    return torch.cat([rows[:size], rows[-1:]])


def _key(name: str) -> str:
    """A parameter's name as ParameterDict takes it."""
    return name.replace(".", "|")


def _name(key: str) -> str:
    return key.replace("|", ".")
