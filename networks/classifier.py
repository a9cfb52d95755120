"""A classifier is a preprocessing step, a trunk and a head."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .builders import INDICES_REMEDY, Builders, build_trunk, takes_indices
from .cosine import UnitRows, unit_trunk
from .full_precision import exact_answer, features_to
from .heads import DustbinHead, GrownHead, ShardedHead, make_head
from .linear_logits import LinearLogits
from .members import MemberHeads, RankOne, cut_trunk, member_head, share_weights
from .row_head import RowHead
from .spec import ModelSpec
from .user_code import CONTRACT, blame

Head = (
    nn.Linear | DustbinHead | ShardedHead | RowHead | GrownHead | UnitRows | MemberHeads | RankOne
)


class Classifier(nn.Module):
    """raw [B, *input.shape] -> preprocess -> trunk -> features [B, D] -> head -> logits.

    The logits are [B, spec.num_outputs], or [K, B, C] of a network with members (spec.members).
    Of members of kind "heads" .trunk is the body that they share and .head the K heads with their
    blocks.  Of kind "batch" .trunk and .head read the batch K times, member by member.

    Attributes
    ----------
    spec : ModelSpec
        What model.json says of it.
    trunk : nn.Module
        [B, *input.shape] -> features [B, D].
    head : Head
        nn.Linear and DustbinHead are what is saved.  GrownHead, while new classes are learnt,
        ShardedHead, while ranks split the rows, RowHead, while few rows learn in each step, and
        UnitRows, while rows learn on the sphere, are there during training only.
    """

    spec: ModelSpec
    trunk: nn.Module
    head: Head
    _gain: Tensor
    _offset: Tensor

    def __init__(self, spec: ModelSpec, trunk: nn.Module, head: Head):
        super().__init__()
        self.spec = spec
        self.trunk = trunk
        self.head = head
        self.forget_schedule()
        # (raw * scale - mean) / std as one multiplication and one addition.
        mean = torch.tensor(spec.input.mean).double()
        std = torch.tensor(spec.input.std).double()
        trailing = (-1, *[1] * (len(spec.input.shape) - 1))
        gain = (spec.input.scale / std).float().view(trailing)
        offset = (-mean / std).float().view(trailing)
        self.register_buffer("_gain", gain, persistent=False)
        self.register_buffer("_offset", offset, persistent=False)

    def forget_schedule(self) -> None:
        """Nothing is frozen, and every parameter has the one rate."""
        self._frozen_norms: frozenset[str] = frozenset()
        self._all_norms_fixed = False
        # {parameter: what its rate is multiplied by}. See set_layer_decay
        self.rate_scales: dict[str, float] = {}

    def preprocess(self, raw: Tensor) -> Tensor:
        """(raw * scale - mean) / std in the network's floating type. indices stay as they are.

        raw: uint8 or float, in raw units, or integers where spec.input.dtype is int32.
        Raises ValueError if one example's shape is not spec.input.shape, and for indices that are
        no integers.
        """
        if tuple(raw.shape[1:]) != self.spec.input.shape:
            needed = ", ".join(map(str, self.spec.input.shape))
            raise ValueError(f"inputs of shape {list(raw.shape)}; [B, {needed}] is needed")
        if self.spec.input.is_indices:
            if raw.is_floating_point():
                raise ValueError(f"inputs of {raw.dtype}; int32 indices are needed")
            return raw
        return torch.addcmul(self._offset, raw.to(self._gain.dtype), self._gain)

    def zero_input(self) -> Tensor:
        """One raw input of zeros, [1, *input.shape], in its dtype: to ask what a network gives."""
        dtype = getattr(torch, self.spec.input.dtype)
        return torch.zeros(1, *self.spec.input.shape, dtype=dtype, device=self._gain.device)

    @property
    def num_members(self) -> int:
        """K. 1 of a plain network, whose logits have no axis of members."""
        return 1 if self.spec.members is None else self.spec.members["count"]

    @property
    def linear_head(self) -> nn.Linear:
        """The head of a classifier that is known to have a plain one, as nn.Linear."""
        assert isinstance(self.head, nn.Linear), f"no plain head: {type(self.head).__name__}"
        return self.head

    def forward(self, raw: Tensor) -> Tensor:
        inputs = self.preprocess(raw)
        if self.spec.members is None or self.spec.members["kind"] == "heads":
            return self.logits_of(self.trunk(inputs))
        tiled = inputs.repeat(self.num_members, *[1] * (inputs.dim() - 1))
        return self.logits_of(self.trunk(tiled)).unflatten(0, (self.num_members, -1))

    @exact_answer
    def logits_of(self, features: Tensor) -> Tensor:
        """The head's logits of the trunk's features.

        Where no gradient is asked they are products in float32 also under autocast: a logit of 20
        in bfloat16 is off by .06.
        """
        return self.head(features_to(self._gain.dtype, features))

    def train(self, mode: bool = True) -> Classifier:
        """Like nn.Module.train, but norms that were frozen stay in eval mode."""
        super().train(mode)
        if mode and (self._frozen_norms or self._all_norms_fixed):
            for name, module in self.named_modules():
                frozen = self._all_norms_fixed or name in self._frozen_norms
                if frozen and isinstance(module, _BatchNorm):
                    module.eval()
        return self


def build_classifier(
    spec: ModelSpec,
    builders: Builders | None = None,
    make: Callable[[ModelSpec, int], Head] = make_head,
) -> Classifier:
    """The network that `spec` describes, with fresh weights from torch's global generator.

    Parameters
    ----------
    spec : ModelSpec
        The contents of a model.json.
    builders : mapping, optional
        {name: callable(shape, **options) -> nn.Module, [B, *shape] -> [B, D]}, for specs that name
        one of them.  networks.choices says what a builder has to be.
    make : callable, optional
        (spec, number of features) -> the head of a plain network.

    Returns
    -------
    Classifier

    Raises
    ------
    ValueError
        For an unknown builder or option, with the nearest valid name. For a trunk that does not
        give [B, D]. For members that it cannot have.

    Examples
    --------
    >>> from networks import InputSpec, ModelSpec, build_classifier
    >>> spec = ModelSpec("convnet", 10, InputSpec(shape=(1, 28, 28)), {"width": 8})
    >>> build_classifier(spec).head
    Linear(in_features=128, out_features=10, bias=True)
    """
    if spec.input.is_indices != takes_indices(spec.builder, builders):
        needed = "numbers" if spec.input.is_indices else "int32 indices"
        raise ValueError(
            f"{spec.builder} reads {needed}; input.dtype is {spec.input.dtype} ({INDICES_REMEDY})"
        )
    trunk = spec_trunk(spec, builders)
    features = _feature_size(trunk, spec)
    head: Head = make(spec, features)
    members = spec.members
    if members and members["kind"] == "heads":
        blocks, whole = members["blocks"], trunk
        trunk, end = cut_trunk(whole, blocks)
        heads = [member_head(end, head)]
        for _ in range(1, members["count"]):
            if blocks:  # they draw their weights only as parts of a whole trunk
                whole = spec_trunk(spec, builders)
            heads.append(member_head(cut_trunk(whole, blocks)[1], make_head(spec, features)))
        head = MemberHeads(heads)
    classifier = Classifier(spec, trunk, head)
    if members and members["kind"] == "batch":
        share_weights(classifier, members["count"])
    return classifier


def spec_trunk(spec: ModelSpec, builders: Builders | None = None) -> nn.Module:
    """The trunk that `spec` describes, up to the features that its head reads."""
    trunk = build_trunk(spec.builder, spec.input.shape, spec.options, builders)
    return unit_trunk(trunk, spec.cosine)


def parameter_count(module: nn.Module, trainable: bool = False) -> int:
    """Number of parameters of a module.

    Parameters
    ----------
    module : nn.Module
        Any module, say a Classifier.
    trainable : bool
        Count only those that training changes.

    Returns
    -------
    int
    """
    parameters = module.parameters()
    if trainable:
        parameters = filter(lambda parameter: parameter.requires_grad, parameters)
    return sum(parameter.numel() for parameter in parameters)


def lazy_logits(classifier: Classifier, raw: Tensor) -> LinearLogits:
    """The logits of a classifier with a plain linear head, never held as one [B, C] tensor.

    Parameters
    ----------
    classifier : Classifier
        Its head has one row per class. The rows of add_classes may still be learning. Where ranks
        split the head, calls on the logits are collective.
    raw : Tensor [B, *input.shape]

    Returns
    -------
    LinearLogits
        For the B rows.

    Raises
    ------
    ValueError
        For a network with members: take member_log_probabilities.
    """
    if classifier.num_members > 1:
        raise ValueError(
            "the logits of a network with members are held; take member_log_probabilities"
        )
    head = classifier.head
    if isinstance(head, ShardedHead):
        return classifier(raw)
    assert isinstance(head, (nn.Linear, GrownHead, UnitRows)), (
        f"no linear head: {type(head).__name__}"
    )
    features = classifier.trunk(classifier.preprocess(raw))
    weight = head.weight
    features = features_to(weight.dtype, features)
    return LinearLogits(features, weight, head.bias, len(weight))


def _feature_size(trunk: nn.Module, spec: ModelSpec) -> int:
    """D, from one input of zeros.  ValueError for a trunk that does not give [B, D]."""
    was_training = trunk.training
    trunk.eval()
    try:
        with torch.no_grad():
            zeros = torch.zeros(1, *spec.input.shape)
            features = trunk(zeros.int() if spec.input.is_indices else zeros)
    except Exception as error:  # the user's forward raises what it likes
        shape = [1, *spec.input.shape]
        raise ValueError(
            f"{spec.builder}: its network fails for an input of {shape}: {blame(error)}; {CONTRACT}"
        ) from None
    trunk.train(was_training)
    if isinstance(features, Tensor) and features.dim() == 2 and len(features) == 1:
        return features.shape[1]
    given = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
    raise ValueError(
        f"builder {spec.builder!r} gives {given} for one input; features [1, D] are needed: "
        f"{CONTRACT}"
    )
