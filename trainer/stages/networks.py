"""Networks of a run: fresh ones, those of finished stages, and those that come from elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from networks import (
    Branch,
    Classifier,
    InputSpec,
    ModelSpec,
    adopt_weights,
    batch_ensemble,
    build_classifier,
    declared_options,
    hydra,
    load_classifier,
    save_classifier,
    widen,
)
from networks.builders import INDICES_REMEDY, takes_indices
from networks.cosine import default_scale, to_unit_rows
from networks.files import finish_parts, save_part
from networks.head_rows import fresh_rows
from networks.heads import ShardedHead
from networks.pretrained import class_names, normalisation, pretrained_file
from networks.texts import INDICES
from networks.user_code import CONTRACT
from pipeline.config import Config, Model, Rerank, Student, UserError
from pipeline.identity import classifier_folder, is_saved_network
from pipeline.store import Attempt, Stage, read_json, write_json

from ..data.decoding import import_function
from ..data.writing import describe
from ..engines.sharded import DistributedComm, class_bounds
from ..session import Session


def fresh_network(
    session: Session,
    student: Student | Rerank | None = None,
    seed: int | None = None,
    members: dict | None = None,
    own_model: dict | None = None,
    split: bool = False,
) -> Classifier:
    """A network of [model], its weights drawn from `seed`, by default the run's.

    student, own_model: the section, or the keys of [model], that count first.  members: of
    networks with several, as in model.json.  split: each rank draws and holds its rows of the
    head alone, where engine.shard_head says so. The weights are the same.
    """
    model = session.config.model
    if student is not None:
        own_model = student.model
    if own_model:
        model = model.merged(own_model)
    shards = session.shards("train")
    builders = user_builders(model.name)
    torch.manual_seed(session.config.seed if seed is None else seed)
    try:
        spec = ModelSpec(
            builder=model.name,
            options=model_options(model, builders),
            num_classes=shards.num_classes,
            class_names=tuple(shards.class_names),
            input=input_spec(session, model.name, builders),
            members=members,
            cosine=cosine_of(model, shards.num_classes),
        )
        world = session.ranks.world_size
        if split and session.config.engine.shard_head and 1 < world <= spec.num_classes:
            return build_classifier(spec, builders, partial(split_head, session))
        return build_classifier(spec, builders)
    except ValueError as error:
        raise UserError(_at_the_door(str(error))) from None


def split_head(session: Session, spec: ModelSpec, in_features: int) -> ShardedHead:
    """This rank's fresh rows of a head over all classes."""
    ranks, classes = session.ranks, spec.num_classes
    bounds = class_bounds(classes, ranks.world_size)
    rows = fresh_rows(classes, in_features, slice(*bounds[ranks.rank : ranks.rank + 2]))
    if spec.cosine is not None:
        to_unit_rows(rows)
    comm = DistributedComm(bounds)
    return ShardedHead(rows, classes, comm, session.config.engine.head_block)


def _at_the_door(error: str) -> str:
    """An error about model.json in the names that the config has for it."""
    for name in ("mean", "std"):
        if error.startswith(f"input.{name}"):
            error = error.replace(f"input.{name}", f"data.{name}", 1)
            error = error.replace("1 or 1 (input.shape[0]) are", "1 is")
            return error.replace("(input.shape[0])", "(the channels of the inputs)")
    return f"[model] {error}"


def input_spec(
    session: Session, name: str, builders: dict[str, Callable] | None = None
) -> InputSpec:
    """What the network `name` reads: the shape and type of train's inputs, and how they were made.

    Indices are not scaled: data.mean and data.std do not count for them.
    ValueError where the network reads indices and the inputs are none, and the other way round.
    """
    shards = session.shards("train")
    shape, kind = tuple(shards.input_shape), shards.input_dtype
    decoders = shards.decoder_names or None
    if takes_indices(name, builders):
        if kind.kind not in "iu":
            raise ValueError(
                f"{name} reads int32 indices; the inputs are {kind} ({INDICES_REMEDY})"
            )
        return InputSpec(shape, "int32", decoders=decoders)
    if INDICES & set(shards.decoder_names.values()):
        raise ValueError(f"{name} reads numbers; ngram_bag makes indices ({INDICES_REMEDY})")
    return InputSpec(
        shape=shape,
        dtype="uint8" if kind == np.uint8 else "float32",
        mean=tuple(session.config.data.mean),
        std=tuple(session.config.data.std),
        pictures=shards.pictures,
        decoders=decoders,
    )


def record_inputs(session: Session, network: Classifier) -> None:
    """Record in a network from elsewhere how this run's inputs are made, which it reads from now.

    ValueError where it learned from pictures that were made otherwise.
    """
    shards, theirs = session.shards("train"), network.spec.input.pictures
    ours = shards.pictures
    if theirs and ours and not theirs.same_pixels(ours):
        raise ValueError(
            f"it learned from pictures made by other rules ({describe(theirs)}) than the data's "
            f"({describe(ours)}); make the shards by its rules"
        )
    decoders = shards.decoder_names or network.spec.input.decoders
    inputs = replace(network.spec.input, pictures=ours or theirs, decoders=decoders)
    network.spec = replace(network.spec, input=inputs)


def model_options(model: Model, builders: dict[str, Callable] | None) -> dict:
    """What the builder gets: [model]'s own keys as far as it declares them, and `options`."""
    generic = {
        "width": model.width,
        "depth": model.depth,
        "embedding": model.embedding,
        "dropout": model.dropout,
    }
    return declared_options(model.name, generic, model.options, builders)


def cosine_of(model: Model, num_classes: int) -> dict | None:
    """The cosine head's settings as in model.json. None for a linear head."""
    if model.head != "cosine":
        return None
    return {
        "scale": default_scale(num_classes) if model.scale is None else model.scale,
        "learned": model.scale is None,
        "margin": model.margin,
        "margin_kind": model.margin_kind,
    }


def load_network(session: Session, stage: Stage) -> Classifier:
    """A finished stage's network, in eval mode, on this rank's device."""
    directory = stage.folder("model.json", "model.safetensors")
    return load_classifier(directory, session.ranks.device, builders_of(session.config))


def save_network(
    session: Session, attempt: Attempt, network: Classifier | Branch, summary: dict
) -> None:
    """The network and what training it took, by rank 0. Of a split head each rank its rows."""
    ranks = session.ranks
    if isinstance(network, Classifier) and isinstance(network.head, ShardedHead):
        save_part(network, attempt.directory, ranks.rank, ranks.world_size)
        session.barrier()
        if ranks.is_main:
            comm = network.head.comm
            assert isinstance(comm, DistributedComm)
            finish_parts(network, attempt.directory, comm.bounds)
    elif ranks.is_main:
        save_classifier(network, attempt.directory)
    if ranks.is_main:
        write_json(attempt.path("summary.json"), summary)


def read_summary(stage: Stage) -> dict:
    return read_json(stage.path("summary.json"))


@dataclass
class Given:
    """A generalist from elsewhere.

    finished: whether it answers already. One with a fresh head is still to be trained.
    notes: one sentence each, of how it was read.
    """

    network: Classifier
    finished: bool = True
    notes: list[str] = field(default_factory=list)


def given_generalist(session: Session) -> Given | None:
    """The network that [generalist] from names. None where it is trained here from scratch.

    It is a run's, one that save_classifier wrote, or a [model] with someone else's weights, or with
    a saved network's and a fresh head.
    """
    chosen = session.config.generalist
    source = chosen.init
    if not source:
        return None
    try:
        if not Path(source).is_dir():
            return _adopted_network(session, source, Path(source))
        if not is_saved_network(source):
            given = _adopted_network(session, source, pretrained_file(Path(source)))
            given.notes += _other_normalisation(session, source)
            return given
        if chosen.has_new_head and not chosen.weights and not chosen.prefix:
            return _saved_trunk(session, source)
        if chosen.head or chosen.weights or chosen.prefix:
            raise ValueError(
                'is a directory of Referral\'s; generalist.head (but "new"), generalist.weights '
                "and generalist.prefix are of a file"
            )
        return Given(_saved_network(session, Path(source)))
    except (OSError, ValueError) as error:
        said = str(error).removeprefix(f"{source}: ")
        raise UserError(f"generalist.from = {source}: {said}") from None


def load_given(session: Session, key: str, path: str) -> Classifier:
    """A network that a key of the config names, ensemble.networks or specialists.from.

    Raises UserError unless it knows the data's classes and reads its inputs.
    """
    try:
        network = _saved_network(session, Path(path))
    except (OSError, ValueError) as error:
        said = str(error).removeprefix(f"{path}: ")
        raise UserError(f"{key}: {path}: {said}") from None
    shape, needed = tuple(session.shards("train").input_shape), network.spec.input.shape
    if shape != needed:
        raise UserError(
            f"{key}: {path} reads inputs of shape {list(needed)}, the data's are {list(shape)}"
        )
    return network


def _adopted_network(session: Session, source: str, file: Path) -> Given:
    """[model] with the weights of a file. Without the file's head, or with other classes, fresh.

    source: as in generalist.from. The file, or the directory that holds it.
    """
    chosen = session.config.generalist
    network = fresh_network(session)
    names = class_names(file.parent)
    adoption = adopt_weights(network, file, chosen.head, chosen.weights, chosen.prefix, names)
    notes = [f"generalist.from = {source}: {note}" for note in adoption.notes]
    if not adoption.with_head:
        notes.append(_say_fresh_head(session, source))
    elif names is None:
        first = session.class_names[0]
        notes.append(
            f"generalist.from = {source}: its head's rows are taken for the classes in their order,"
            f" the first for {first}; nothing beside the file says what they are called"
        )
    return Given(network.to(session.ranks.device), adoption.with_head, notes)


def _saved_trunk(session: Session, source: str) -> Given:
    """[model] with the trunk of a run's generalist, or of another saved network, and a fresh head.

    The classes may be others, and so may the rules by which pictures were made.
    """
    folder = classifier_folder(Path(source))
    saved = load_classifier(folder, "cpu", builders_of(session.config))
    network = fresh_network(session)
    theirs, ours = saved.spec, network.spec
    if (theirs.builder, dict(theirs.options)) != (ours.builder, dict(ours.options)):
        raise ValueError(
            f"its trunk is {theirs.builder} {dict(theirs.options)}, [model] builds {ours.builder} "
            f"{dict(ours.options)}; give [model] the same name and options"
        )
    if theirs.input.shape != ours.input.shape or theirs.members is not None:
        held = "several members" if theirs.members else f"inputs {list(theirs.input.shape)}"
        raise ValueError(f"it has {held}; one network of inputs {list(ours.input.shape)} is needed")
    network.trunk.load_state_dict(saved.trunk.state_dict())
    notes = []
    if (theirs.input.mean, theirs.input.std) != (ours.input.mean, ours.input.std):
        notes.append(_say_normalisation(source, list(theirs.input.mean), list(theirs.input.std)))
    notes.append(_say_fresh_head(session, source))
    return Given(network.to(session.ranks.device), False, notes)


def _other_normalisation(session: Session, source: str) -> list[str]:
    """A line where a network learned from inputs of another mean and deviation than the data's."""
    theirs = normalisation(Path(source))
    data = session.config.data
    channels = session.shards("train").input_shape[0]

    def spread(values: list[float]) -> list[float]:
        return values * channels if len(values) == 1 else values

    if theirs is None or tuple(map(spread, theirs)) == (spread(data.mean), spread(data.std)):
        return []
    return [_say_normalisation(source, *theirs)]


def _say_normalisation(source: str, mean: list[float], std: list[float]) -> str:
    return (
        f"generalist.from = {source}: it learned from inputs with data.mean = {mean} and data.std "
        f"= {std}, which are not this run's; set them so"
    )


def _say_fresh_head(session: Session, source: str) -> str:
    return (
        f"generalist.from = {source}: its trunk and a fresh head of {session.num_classes} rows "
        "are trained from there, as [train] says"
    )


def _saved_network(session: Session, path: Path) -> Classifier:
    """Load a run's generalist, or the network that another directory holds."""
    path = classifier_folder(path)
    network = load_classifier(path, session.ranks.device, builders_of(session.config))
    if network.num_members > 1:
        raise ValueError(f"it has {network.num_members} members; a generalist has one")
    if network.spec.num_classes != session.num_classes:
        raise ValueError(
            f"it knows {network.spec.num_classes} classes, the data has {session.num_classes}"
        )
    check_class_names(network.spec.class_names, session.class_names)
    if network.spec.input.shape == tuple(session.shards("train").input_shape):
        record_inputs(session, network)
    return network


def check_class_names(theirs: Sequence[str], ours: Sequence[str]) -> None:
    """ValueError where a network's classes have names, and these are not the data's, in order."""
    unnamed = list(map(str, range(len(theirs))))
    if list(theirs) in (list(ours), unnamed):
        return
    place = next(
        index for index, pair in enumerate(zip(theirs, ours, strict=True)) if pair[0] != pair[1]
    )
    raise ValueError(
        f"its class {place} is {theirs[place]!r}, the data's {ours[place]!r}: "
        "rows of its head would stand for other classes"
    )


def student_network(
    session: Session,
    name: str,
    student: Student,
    started: Callable[[str], Classifier] | None = None,
) -> Classifier:
    """Fresh, a copy of the generalist, or another student's network, with as many members as asked.

    started: gives the network that it starts from, by name. By default that of its finished stage.

    The copy is widened where the student's [model] is a wider one.  The seed is drawn from the
    student's name, so that it never shares its teacher's initialization.
    """
    seed = session.seed(f"student {name}", 0)
    members = student_members(session.config, student)
    started = started or partial(_finished, session)
    if student.start == "scratch":  # every head, or factor, drawn by itself
        return fresh_network(session, student, seed, members)
    if student.start == "generalist":
        spec = fresh_network(session, student, seed).spec
        network = _widened(session, started("generalist"), spec)
    else:
        network = started(student.start)
    if network.spec.members == members:
        return network
    if members is None:
        raise UserError(
            f"students.{name}.start = {student.start!r} has {network.num_members} members, "
            'which network = "single" cannot be grown from'
        )
    try:
        if student.network == "hydra":
            return hydra(network, members["count"], student.head_blocks)
        generator = torch.Generator().manual_seed(seed)
        return batch_ensemble(network, members["count"], generator=generator)
    except ValueError as error:
        raise UserError(f"students.{name}: {error}") from None


def student_members(config: Config, student: Student) -> dict | None:
    """The members' settings as in model.json. None for a single network."""
    count = student.members or config.ensemble.num_networks
    if student.network == "hydra":
        return {"kind": "heads", "count": count, "blocks": student.head_blocks}
    if student.network == "batch_ensemble":
        return {"kind": "batch", "count": count}
    return None


def _finished(session: Session, name: str) -> Classifier:
    """The generalist, or a student by name, from its stage."""
    stage = session.run.generalist if name == "generalist" else session.run.students[name]
    return load_network(session, stage)


def _widened(session: Session, generalist: Classifier, spec: ModelSpec) -> Classifier:
    if generalist.spec == spec:
        return generalist
    try:
        return widen(generalist, spec, torch.Generator().manual_seed(session.config.seed))
    except ValueError as error:
        raise UserError(f'{error}; a student of another shape needs start = "scratch"') from None


def user_builders(name: str) -> dict[str, Callable] | None:
    """A `module:function` of the config, imported. A loaded file never names code."""
    if ":" not in name or name.startswith("timm:"):
        return None
    try:
        return {name: import_function(name, "model.name")}
    except UserError as error:
        raise UserError(f"{error}; {CONTRACT}") from None


def builders_of(config: Config) -> dict[str, Callable]:
    """The user's own builders that the config names, of all its networks."""
    names = [config.model.name]
    sections = [config.controls, config.rerank, *config.students.values()]
    names += [section.model.get("name", "") for section in sections]
    builders: dict[str, Callable] = {}
    for name in names:
        builders |= user_builders(name) or {}
    return builders
