"""A classifier is a preprocessing step, a trunk and a head."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .builders import BUILTIN, build_trunk
from .heads import make_head
from .members import MemberHeads, cut_trunk, member_head, share_weights
from .spec import ModelSpec


class Classifier(nn.Module):
    """raw [B, *input.shape] -> .preprocess -> .trunk -> features [B, D] -> .head -> logits [B, spec.num_outputs].

    With members (spec.members) the logits are [K, B, C].  Of kind "heads" .trunk is the body that they share and .head
    the K heads with their blocks; of kind "batch" .trunk and .head read the batch K times, member by member.
    """

    def __init__(self, spec: ModelSpec, trunk: nn.Module, head: nn.Module):
        super().__init__()
        self.spec, self.trunk, self.head = spec, trunk, head
        self._frozen_norms: frozenset[str] = frozenset()
        self._all_norms_fixed = False
        # (raw * scale - mean) / std as one multiplication and one addition.
        mean, std = torch.tensor(spec.input.mean).double(), torch.tensor(spec.input.std).double()
        trailing = (-1, *[1] * (len(spec.input.shape) - 1))
        self.register_buffer(
            "_gain", (spec.input.scale / std).float().view(trailing), persistent=False
        )
        self.register_buffer("_offset", (-mean / std).float().view(trailing), persistent=False)

    def preprocess(self, raw: Tensor) -> Tensor:
        """(raw * scale - mean) / std in the network's floating type; raw is uint8 or float, in raw units.

        Raises ValueError if one example's shape is not spec.input.shape.
        """
        if tuple(raw.shape[1:]) != self.spec.input.shape:
            needed = ", ".join(map(str, self.spec.input.shape))
            raise ValueError(f"inputs of shape {list(raw.shape)}; [B, {needed}] is needed")
        return torch.addcmul(self._offset, raw.to(self._gain.dtype), self._gain)

    @property
    def num_members(self) -> int:
        """K; 1 of a plain network, whose logits have no axis of members."""
        return 1 if self.spec.members is None else self.spec.members["count"]

    def forward(self, raw: Tensor) -> Tensor:
        inputs = self.preprocess(raw)
        if self.spec.members is None or self.spec.members["kind"] == "heads":
            return self.head(self.trunk(inputs))
        tiled = inputs.repeat(self.num_members, *[1] * (inputs.dim() - 1))
        return self.head(self.trunk(tiled)).unflatten(0, (self.num_members, -1))

    def train(self, mode: bool = True) -> Classifier:
        """As nn.Module's, but batch norm that set_trainable or freeze_norm has frozen stays in eval mode."""
        super().train(mode)
        if mode and (self._frozen_norms or self._all_norms_fixed):
            for name, module in self.named_modules():
                if isinstance(module, _BatchNorm) and (
                    self._all_norms_fixed or name in self._frozen_norms
                ):
                    module.eval()
        return self


def build_classifier(spec: ModelSpec, builders: dict[str, Callable] | None = None) -> Classifier:
    """The network that `spec` describes, with fresh weights from torch's global generator.

    builders: {name: callable(shape, **options) -> nn.Module, [B, *shape] -> [B, D]}, for specs that name one of them.
    Raises ValueError for an unknown builder or option, with the nearest valid name, for a trunk not giving [B, D], and
    for members that it cannot have.
    """
    trunk = build_trunk(spec.builder, spec.input.shape, spec.options, builders)
    features = _feature_size(trunk, spec, builders)
    head, members = make_head(spec, features), spec.members
    if members and members["kind"] == "heads":
        blocks, whole = members["blocks"], trunk
        trunk, end = cut_trunk(whole, blocks)
        heads = [member_head(end, head)]
        for _ in range(1, members["count"]):
            if blocks:  # they draw their weights only as parts of a whole trunk
                whole = build_trunk(spec.builder, spec.input.shape, spec.options, builders)
            heads.append(member_head(cut_trunk(whole, blocks)[1], make_head(spec, features)))
        head = MemberHeads(heads)
    classifier = Classifier(spec, trunk, head)
    if members and members["kind"] == "batch":
        share_weights(classifier, members["count"])
    return classifier


def parameter_count(module: nn.Module, trainable: bool = False) -> int:
    """Number of parameters of `module`, or only of those that training changes."""
    return sum(
        parameter.numel()
        for parameter in module.parameters()
        if parameter.requires_grad or not trainable
    )


def _feature_size(trunk: nn.Module, spec: ModelSpec, builders) -> int:
    was_training = trunk.training
    trunk.eval()
    with torch.no_grad():
        features = trunk(torch.zeros(1, *spec.input.shape))
    trunk.train(was_training)
    if not isinstance(features, Tensor) or features.dim() != 2:
        assert spec.builder not in BUILTIN or builders
        shape = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(
            f"builder {spec.builder!r} gives {shape} for one input; features [1, D] are needed"
        )
    return features.shape[1]
