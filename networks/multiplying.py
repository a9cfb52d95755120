"""Grow a network with several members from a plain classifier."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch

from .classifier import Classifier
from .members import FACTOR_STD, MemberHeads, cut_trunk, member_head, share_weights
from .spec import ModelSpec


def hydra(classifier: Classifier, count: int, blocks: int = 0) -> Classifier:
    """Several heads on one body, each a copy of a classifier's last blocks and linear layer.

    Every member starts as the classifier.

    Parameters
    ----------
    classifier : Classifier
        A plain one.  It stays as it is.
    count : int
        Number of heads, K.
    blocks : int
        How many of the trunk's last blocks each head has for itself.

    Returns
    -------
    Classifier
        Its logits are [K, B, C], and nothing in it is frozen.

    Raises
    ------
    ValueError
        For a specialist, for a network with members, and for more blocks than the trunk has.

    References
    ----------
    Tran et al. 2020, Hydra: Preserving Ensemble Diversity for Model Distillation, section 3, where
    "the Hinton head" grows into the others.
    """
    spec = _spec_with_members(classifier, {"kind": "heads", "count": count, "blocks": blocks})
    body, end = cut_trunk(copy.deepcopy(classifier.trunk), blocks)
    first = member_head(end, copy.deepcopy(classifier.head))
    heads = MemberHeads([first, *(copy.deepcopy(first) for _ in range(1, count))])
    return _thawed(Classifier(spec, body, heads), classifier)


def batch_ensemble(
    classifier: Classifier,
    count: int,
    std: float = FACTOR_STD,
    generator: torch.Generator | None = None,
) -> Classifier:
    """A BatchEnsemble on a plain classifier's weights.

    Parameters
    ----------
    classifier : Classifier
        A plain one.  It stays as it is.
    count : int
        Number of members, K.
    std : float
        Of the factors, drawn from N(1, std).  With 0 every member starts as the classifier.
    generator : torch.Generator, optional
        By default torch's global one.

    Returns
    -------
    Classifier
        Its logits are [K, B, C], and nothing in it is frozen.

    Raises
    ------
    ValueError
        For a specialist, for a network with members, and for one with a linear layer that is
        neither Linear nor Conv2d.

    References
    ----------
    Wen et al. 2020, BatchEnsemble. Nam et al. 2021, Diversity Matters When Learning From Ensembles.
    """
    spec = _spec_with_members(classifier, {"kind": "batch", "count": count})
    grown = Classifier(spec, copy.deepcopy(classifier.trunk), copy.deepcopy(classifier.head))
    share_weights(grown, count, std, generator)
    return _thawed(grown, classifier)


def _spec_with_members(classifier: Classifier, members: dict) -> ModelSpec:
    if classifier.spec.members is not None:
        raise ValueError("this network has members already; they grow from a plain one")
    return replace(classifier.spec, members=members)


def _thawed(grown: Classifier, classifier: Classifier) -> Classifier:
    """`grown`, in the mode, type and place of its parent, without gradients and nothing frozen."""
    for parameter in grown.parameters():
        parameter.grad = None
    weight = next(classifier.parameters())
    return grown.requires_grad_(True).to(weight.device, weight.dtype).train(classifier.training)
