"""The loss of a Prior Network, which answers with a Dirichlet distribution.  Malinin & Gales 2019.

B batch, C classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .probabilities import to_float32


def prior_network_loss(logits: Tensor, labels: Tensor, concentration: float = 1e3) -> Tensor:
    """Reverse KL( Dir(exp(logits)) || Dir(1 + concentration onehot(label)) ), a mean over B.

    Computed in float64, finite for logits from -345 to 690.  The loss itself grows like
    exp(-logit) for a class that is thought impossible, which float32 cannot hold below -88.

    Parameters
    ----------
    logits : Tensor [B, C]
    labels : int64 Tensor [B]
        Each a class.
    concentration : float

    Returns
    -------
    Tensor []
        Of the logits' dtype, float32 at least.

    References
    ----------
    Malinin & Gales 2019, "Reverse KL-Divergence Training of Prior Networks".
    """
    target = torch.ones_like(logits, dtype=torch.float64)
    target.scatter_(1, labels[:, None], 1 + concentration)
    return dirichlet_kl(logits.double().exp(), target).mean().to(to_float32(logits).dtype)


def dirichlet_kl(alpha: Tensor, beta: Tensor) -> Tensor:
    """KL( Dir(alpha) || Dir(beta) ), float64 [B], of positive parameters [B, C].

    Computed in float64.  Accurate to rounding, in value and gradient, for parameters from 1e-150
    (where digamma's own slope overflows) up to 1e300 / C.
    """
    alpha, beta = alpha.double(), beta.double()
    total = alpha.sum(-1)
    # ln G(a0) - sum ln G(a_i) + sum a_i (psi(a_i) - psi(a0)), a0 = sum a_i, is a difference of
    # numbers of size a log a.  With h(x) = ln G(x) - x psi(x) + x it is h(a0) - sum h(a_i), of
    # size log a, as the x cancel.
    own = entropic(total) - entropic(alpha).sum(-1)
    other = torch.lgamma(beta).sum(-1) - torch.lgamma(beta.sum(-1))
    return own + other + (beta * (torch.digamma(total)[..., None] - torch.digamma(alpha))).sum(-1)


def entropic(x: Tensor) -> Tensor:
    """h(x) = ln Gamma(x) - x psi(x) + x in float64, without its cancellation.

    It is about -log(x) / 2 for large x.
    """
    # Stirling's series for ln Gamma and psi. The first term left out, x^-7 / 210, is below 1e-15
    # from here on.
    start = 64.0
    # Each branch sees only its own arguments, so that no gradient is nan.
    low = x.clamp_max(start)
    high = x.clamp_min(start)
    near = torch.lgamma(low) - low * torch.digamma(low) + low
    inverse = 1 / high
    series = inverse * (1 / 6 - inverse**2 * (1 / 90 - inverse**2 / 210))
    far = (math.log(2 * math.pi) + 1 - high.log()) / 2 + series
    return torch.where(x < start, near, far)
