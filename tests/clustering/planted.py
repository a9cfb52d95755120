"""Predictions whose confusable classes are known."""

import numpy as np


def planted_predictions(
    num_classes, num_groups, per_class, top_k=10, noise=0.2, seed=0, groups_seed=None
):
    """indices, values [N, k], labels [N], group_of [C].

    The predictions beside the label fall in its group, but for a fraction `noise` of them.  A
    label's own probability is 0.3 to 0.9. The others share the rest in exponentially distributed
    parts.  The top prediction is sometimes wrong.  groups_seed: the groups of that seed.
    """
    rng = np.random.default_rng(seed)
    group_of = rng.permutation(np.arange(num_classes) % num_groups)
    if groups_seed is not None:
        groups = np.random.default_rng(groups_seed)
        group_of = groups.permutation(np.arange(num_classes) % num_groups)
    by_group = np.argsort(group_of, kind="stable")
    starts = np.searchsorted(group_of[by_group], np.arange(num_groups))
    sizes = np.bincount(group_of, minlength=num_groups)
    labels = np.repeat(np.arange(num_classes), per_class)
    group = group_of[labels][:, None]
    offsets = (rng.random((len(labels), top_k - 1)) * sizes[group]).astype(np.int64)
    inside = by_group[starts[group] + offsets]
    anywhere = rng.integers(0, num_classes, inside.shape)
    others = np.where(rng.random(inside.shape) < noise, anywhere, inside)
    indices = np.concatenate([labels[:, None], others], axis=1)
    # A class drawn twice in a row keeps its first place. -1 pads the row.
    order = np.argsort(indices, axis=1, kind="stable")
    ordered = np.take_along_axis(indices, order, 1)
    again = np.zeros(indices.shape, dtype=bool)
    np.put_along_axis(again, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], 1)
    values = rng.exponential(size=indices.shape)
    values[:, 0] = 0
    values[again] = 0
    own = rng.uniform(0.3, 0.9, len(labels))
    values *= ((1 - own) * 0.95 / np.maximum(values.sum(axis=1), 1e-9))[:, None]
    values[:, 0] = own
    return np.where(again, -1, indices), values.astype(np.float32), labels, group_of


def labels_of(groups):
    """The group of each class, [C], for groups that are a partition."""
    labels = np.full(groups.num_classes, -1)
    for group, classes in enumerate(groups.members):
        assert (labels[classes] == -1).all()
        labels[classes] = group
    assert (labels >= 0).all()
    return labels
