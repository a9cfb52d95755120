"""The geometric mean of networks over all classes: one product where their heads are linear."""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks import Classifier


class MeanLogits:
    """raw inputs [B, ...] -> the mean of all members' logits, [B, C].

    softmax of it is the geometric mean of the members' distributions, renormalised: what each
    member's logits lack to log-probabilities is the same for all classes of a row.  The mean of K
    linear heads is one linear layer over their features side by side,

        (1/K) sum_k (W_k h_k + b_k) = [W_1 .. W_K] / K [h_1; ..; h_K] + mean b_k,

    so that the [B, C] logits are written once and not K times.  The weights side by side are a
    copy.  A network of several members, or with another head, gives its logits by itself.

    Parameters
    ----------
    networks : sequence of networks.Classifier
        Of one label set.  They are put into eval mode.
    """

    def __init__(self, networks: Sequence[Classifier]):
        self.networks = [network.eval() for network in networks]

    @cached_property
    def joint_head(self) -> tuple[Tensor, Tensor] | None:
        """(weight [C, sum of D_k], bias [C]). None where a head is no plain linear layer."""
        heads = [network.head for network in self.networks]
        if not all(isinstance(head, nn.Linear) for head in heads):
            return None
        count = len(heads)
        weights = [network.linear_head.weight.detach() for network in self.networks]
        bias = weights[0].new_zeros(len(weights[0]))
        for network in self.networks:
            if network.linear_head.bias is not None:
                bias += network.linear_head.bias.detach() / count
        return torch.cat(weights, 1) / count, bias

    def __call__(self, raw: Tensor) -> Tensor:
        if self.joint_head is None:
            return self._one_by_one(raw)
        weight, bias = self.joint_head
        features = [network.trunk(network.preprocess(raw)) for network in self.networks]
        # In float32 also under autocast: a logit of 20 in bfloat16 is off by .06.
        with torch.autocast(raw.device.type, enabled=False):
            return F.linear(torch.cat(features, 1).to(weight), weight, bias)

    def _one_by_one(self, raw: Tensor) -> Tensor:
        parts = []
        for network in self.networks:
            logits = network(raw).float()
            parts.append(logits.sum(0) if logits.dim() == 3 else logits)
        count = sum(network.num_members for network in self.networks)
        return torch.stack(parts).sum(0) / count
