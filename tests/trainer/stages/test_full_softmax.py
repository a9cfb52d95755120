"""Specialists with a full softmax (Hinton et al. 2015, section 6.1): their loss and their runs."""

import numpy as np
import pytest
import torch
from running import run_all
from toy import NUM_CLASSES, toy_config, write_toy

from clustering import ClassGroups
from networks import ModelSpec, build_classifier, load_classifier, specialise
from pipeline.config import UserError, load_config
from pipeline.store import read_json
from trainer.core.objectives import specialise_fully, specialise_in, with_dustbin
from trainer.data.streams import Batch
from trainer.distributed.ranks import process_group
from trainer.session import Session
from trainer.stages.grouping import groups_of
from trainer.stages.networks import load_network
from trainer.stages.validate import SpecialistValidator

CLASSES, C = np.array([1, 4, 5]), 7


def random_network(seed=0):
    torch.manual_seed(seed)
    spec = ModelSpec(
        builder="mlp",
        num_classes=C,
        input={"shape": [2, 3], "dtype": "float32"},
        options={"width": 8},
    )
    return build_classifier(spec)


def random_batch():
    torch.manual_seed(1)
    labels = torch.arange(40) % C
    return Batch(torch.randn(40, 2, 3), labels, labels, torch.zeros_like(labels))


def test_the_dustbin_of_all_logits_is_the_log_sum_exp_of_the_other_classes():
    logits = torch.tensor([[0.1, 0.25, 0.15, 0.5]]).log()
    p = with_dustbin(logits, np.array([1, 3])).exp()
    torch.testing.assert_close(p, torch.tensor([[0.25, 0.5, 0.25]]))


def test_a_group_of_every_class_has_an_empty_dustbin_and_a_finite_loss():
    network, batch = random_network(), random_batch()
    assert (with_dustbin(network(batch.inputs), np.arange(C))[:, -1] == -torch.inf).all()
    loss = specialise_fully(random_network(2), np.arange(C), C, 0.0)(network, batch)
    loss.backward()
    plain = torch.nn.functional.cross_entropy(network(batch.inputs), batch.labels)
    torch.testing.assert_close(loss, plain)
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


@pytest.mark.parametrize(
    "log_prior", [None, torch.tensor([0.3, -1.0, 0.2])], ids=["natural", "balanced"]
)
def test_a_full_specialist_starts_with_the_loss_of_the_one_that_sums_the_rest(log_prior):
    """Soft targets from itself add nothing: shift and prior must act as in specialise_in."""
    generalist, batch = random_network(), random_batch()
    full = specialise_fully(generalist, CLASSES, C, 1.7, log_prior)
    summed = specialise_in(CLASSES, C, 1.7, log_prior=log_prior)
    expected = summed(specialise(generalist, CLASSES), batch)
    torch.testing.assert_close(full(generalist, batch), expected)


def test_soft_weight_multiplies_what_the_generalist_adds():
    generalist, network, batch = random_network(), random_network(2), random_batch()

    def loss(weight):
        objective = specialise_fully(generalist, CLASSES, C, 1.7, soft_weight=weight)
        return objective(network, batch)

    none, one, three = loss(0.0), loss(1.0), loss(3.0)
    torch.testing.assert_close(none, specialise_fully(None, CLASSES, C, 1.7)(network, batch))
    torch.testing.assert_close(three - none, 3 * (one - none))
    assert one > none + 0.01


def test_the_generalist_that_teaches_gets_no_gradient_and_stays_as_it_is():
    generalist, network = random_network(), random_network(2)
    specialise_fully(generalist, CLASSES, C, 0.0)(network, random_batch()).backward()
    assert all(parameter.grad is None for parameter in generalist.parameters())
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """Specialists of both kinds with one generalist's groups."""
    root = tmp_path_factory.mktemp("runs")
    small = ["controls.enabled=false", "students={}"]
    summed = run_all(root / "summed", toy_config(data, *small))
    full = [f"generalist.from={root / 'summed'}", "specialists.dustbin=full"]
    config = toy_config(data, *small, *full)
    return {"preserving": summed, "full": run_all(root / "full", config)}


def test_full_softmaxes_predict_through_the_same_ensemble(runs):
    run = runs["full"]
    assert all(stage.is_done for stage in run.stages)
    heads = [ModelSpec.load(each.path("model.json")).head for each in run.specialists]
    assert all(head["kind"] == "dustbin" and head["rows"] == "all" for head in heads)
    rows = {name: read_json(runs[name].evaluate.path("ensemble.json"))["row"] for name in runs}
    before = read_json(run.evaluate.path("generalist.json"))["row"]
    assert rows["full"]["nll"] < before["nll"] and rows["full"]["nll"] != rows["preserving"]["nll"]


def test_the_saved_network_has_the_metrics_measured_while_it_had_all_its_rows(runs):
    run = runs["full"]
    with process_group(run.config.engine) as ranks:
        session = Session(run, ranks)
        for classes, stage in zip(groups_of(session).members, run.specialists, strict=True):
            before = read_json(stage.path("summary.json"))["val"]
            after = SpecialistValidator(session, classes)(load_classifier(stage.path("").resolve()))
            assert after == pytest.approx(before, rel=1e-5)


def divergence_of(generalist, specialist, group_size):
    """A function of a batch: KL of generalist to specialist among the classes outside the group."""
    head = specialist.head
    rows = head.row_classes[group_size:]

    def measure(batch):
        features = specialist.trunk(specialist.preprocess(batch.inputs))
        theirs = (features @ head.weight.T + head.bias)[:, group_size:].log_softmax(1)
        p = generalist(batch.inputs)[:, rows].log_softmax(1)
        return {"kl": (p.exp() * (p - theirs)).sum(1), "labels": batch.labels}

    return measure


def test_among_other_classes_a_full_specialist_stays_nearer_to_the_generalist(runs):
    """Mean KL over the specialists, on val: the soft targets train for that."""

    def drift(run):
        groups, means = ClassGroups.load(run.cluster.path("groups.json")), []
        with process_group(run.config.engine) as ranks:
            session = Session(run, ranks)
            generalist = load_network(session, run.generalist)
            for classes, stage in zip(groups.members, run.specialists, strict=True):
                specialist = load_classifier(stage.path("").resolve())
                outside = set(specialist.head.row_classes[len(classes) :].tolist())
                assert outside == set(range(NUM_CLASSES)) - set(classes.tolist())
                divergence = divergence_of(generalist, specialist, len(classes))
                values = session.measured(session.shards("val"), divergence)
                means.append(values["kl"][~np.isin(values["labels"], classes)].mean())
        return np.mean(means)

    assert drift(runs["full"]) < 0.7 * drift(runs["preserving"])


def test_at_soft_weight_0_a_full_softmax_learns_what_the_sum_of_the_rest_does(runs, data, tmp_path):
    given = f"generalist.from={runs['preserving'].root}"
    small = ("controls.enabled=false", "specialists.steps=5")
    only = {"generalist", "measure", "cluster", "route", "specialist"}

    def weights(name, *settings):
        run = run_all(tmp_path / name, toy_config(data, given, *small, *settings), only)
        networks = [load_classifier(stage.path("").resolve()) for stage in run.specialists]
        return [network.state_dict() for network in networks]

    full = weights(
        "full", "specialists.dustbin=full", "specialists.soft_weight=0", "engine.shard_head=true"
    )
    torch.testing.assert_close(full, weights("summed"), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["train.label_smoothing=0.1"], "specialists.label_smoothing = 0"),
        (["specialists.dustbin_rows=5"], "a full softmax has them all"),
    ],
    ids=["smoothing", "rows"],
)
def test_a_full_softmax_refuses_settings_that_contradict_it(settings, message):
    with pytest.raises(UserError, match=message):
        load_config(None, ["specialists.dustbin=full", *settings], {})


def test_a_soft_weight_without_a_full_softmax_is_refused():
    with pytest.raises(UserError, match="which alone learns from the generalist"):
        load_config(None, ["specialists.soft_weight=0.5"], {})


def test_the_generalists_predictions_weigh_a_tenth_in_a_full_softmax_by_default():
    def weight(*settings: str) -> float:
        return load_config(None, list(settings), {}).specialists.soft_weight

    assert weight("specialists.dustbin=full") == 0.1
    assert weight("specialists.dustbin=full", "specialists.soft_weight=1") == 1
    again = load_config(None, [], load_config(None, ["specialists.dustbin=full"], {}).dump())
    assert again.specialists.soft_weight == 0.1
    assert load_config(None, [], load_config(None, [], {}).dump()) == load_config(None, [], {})
