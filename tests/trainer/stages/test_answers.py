"""How teachers answer: stored by mass, or live about the view that the student sees."""

import json
import shutil

import numpy as np
import pytest
import torch
from altered import altered
from running import run_all
from toy import NUM_CLASSES, toy_config, write_toy

from networks import load_classifier
from pipeline.config import UserError, load_config
from pipeline.files import DamagedFile
from pipeline.graph import RunDirectory
from pipeline.store import read_json, write_json
from trainer.core.probabilities import average_members, soften
from trainer.data.shards import open_shards
from trainer.data.streams import Batch
from trainer.distributed.ranks import ALONE
from trainer.session import Session
from trainer.stages import stored_targets, student, targets, teachers
from trainer.stages.networks import student_network

SHORT = {"steps": 10, "learning_rate": 0.003, "start": "scratch"}
STUDENTS = {
    "stored": SHORT | {"temperature": 2.0},
    "live": SHORT | {"temperature": 2.0, "answers": "live"},
    "half": SHORT | {"answers_mass": 0.5},
    "less": SHORT | {"answers_mass": 0.7, "temperature": 2.0},
    "geometric": SHORT | {"answers": "live", "mean": "geometric"},
    "corrected": SHORT | {"wrong_weight": 1.0},
}
DEEP = {"kind": "deep", "members": 2}


def config_of(data, students, *overrides, **sections):
    base = toy_config(data).dump() | {"students": students, "ensemble": DEEP} | sections
    base["controls"] = {"enabled": False}
    return load_config(None, ["train.steps=30", *overrides], base)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("data") / "toy")


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """Rows keep 2 classes at least, not 32, of which the toy has fewer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(targets, "LEAST", 2)
        return run_all(tmp_path_factory.mktemp("answers") / "run", config_of(data, STUDENTS))


def session_of(run):
    return Session(run, ALONE)


def batch_of(run, count=40):
    train = open_shards(run.config.data.train, run.config.data, "train")
    ids = np.arange(0, len(train), len(train) // count)[:count]
    labels, numbers = torch.from_numpy(train.labels[ids]), torch.from_numpy(ids)
    inputs = torch.from_numpy(train.read(ids)[0])
    return Batch(inputs, labels, numbers, torch.zeros_like(numbers))


def exact(run, inputs):
    """The members' distributions, [K, B, C]."""
    stages = [run.generalist, *run.members]
    networks = [load_classifier(stage.path("model.safetensors").parent) for stage in stages]
    with torch.no_grad():
        return torch.stack([network(inputs).softmax(1) for network in networks])


def read_rows(stage, rows):
    members = read_json(stage.path("train/answers.json"))["members"]
    count = len(np.load(stage.path("train/starts.npy"))) // members
    read = stored_targets.rows_by_mass(stage.path("train"), NUM_CLASSES, members, count)
    return stored_targets.restored(read(rows), NUM_CLASSES, "cpu")


def test_stored_rows_hold_the_mass_at_the_students_temperature(run):
    stage, batch = run.targets_for("less"), batch_of(run)
    kept, p = read_rows(stage, batch.ids.numpy()), exact(run, batch.inputs)
    notes = read_json(stage.path("train/answers.json"))
    assert (notes["mass"], notes["temperature"], notes["schema"]) == (0.7, 2.0, 3)
    assert kept.counts is not None, "all rows keep alike: the test says nothing"
    assert int(kept.counts.min()) >= 2 and kept.counts.float().std() > 0
    assert notes["mean_classes"] == pytest.approx(float(kept.counts.float().mean()), rel=0.2)
    softened = soften(p, 2.0)
    for k in range(2):
        for row in range(len(batch)):
            count = int(kept.counts[k, row])
            own = kept.indices[k, row, :count]
            assert set(own.tolist()) == set(p[k, row].topk(count).indices.tolist())
            assert float(softened[k, row, own].sum()) >= 0.7 - 1e-3
            assert count == 2 or float(softened[k, row, own[:-1]].sum()) < 0.7 + 1e-3


def test_a_smaller_mass_is_a_smaller_file_and_another_directory(run):
    whole, half = run.targets_for("stored"), run.targets_for("half")
    assert whole.place == "targets/ensemble" and half.place.startswith("targets/ensemble-")
    of_whole, of_half = (read_json(s.path("train/answers.json")) for s in (whole, half))
    assert of_half["mean_classes"] < of_whole["mean_classes"] / 2
    assert of_half["truncation_kl"]["1"] > 10 * of_whole["truncation_kl"]["1"]
    size = half.path("train/log_values.bin").stat().st_size
    rows = open_shards(run.config.data.train, run.config.data, "train").num_samples * 2
    assert size == pytest.approx(2 * rows * of_half["mean_classes"])


@pytest.mark.parametrize("name, T", [("stored", 1.0), ("stored", 2.0), ("half", 1.0)])
def test_the_kl_that_is_said_is_the_one_of_all_classes(run, name, T):
    """Every row is measured: train has fewer than MEASURED."""
    stage = run.targets_for(name)
    notes = read_json(stage.path("train/answers.json"))
    train = open_shards(run.config.data.train, run.config.data, "train")
    ids = np.arange(len(train))
    p = exact(run, torch.from_numpy(train.read(ids)[0])).double()
    q = read_rows(stage, ids).spread().double()
    p, q = soften(p, T), soften(q, T)
    kl = (p * (p.log() - q.log())).sum(-1).mean()
    assert notes["measured"] == len(train)
    assert notes["truncation_kl"][f"{T:g}"] == pytest.approx(float(kl), rel=0.02, abs=2e-6)


def test_a_students_summary_says_how_its_teacher_answered(run):
    def answers(name):
        return read_json(run.students[name].path("summary.json")).get("answers")

    notes = read_json(run.targets_for("stored").path("train/answers.json"))
    stored = answers("stored")
    assert (stored["kind"], stored["temperature"]) == ("stored", 2.0)
    assert stored["kl"] == notes["truncation_kl"]["2"]
    assert answers("live")["kind"] == "live" and "kl" not in answers("live")
    p = exact(run, batch_of(run).inputs)
    entropy = float(-(p * p.log()).sum(-1).mean())
    for name in ("stored", "live"):
        assert answers(name)["entropy"]["seen"] == pytest.approx(entropy, rel=0.15)
    assert answers("stored")["entropy"] == pytest.approx(answers("live")["entropy"], rel=1e-3)
    assert run.targets_for("live") is None and run.targets_for("geometric") is None
    page = (run.root / "report.html").read_text()
    assert f"were stored, {stored['kl']:.2g} nats (KL) from the whole distribution" in page


def test_far_answers_are_warned_of_at_temperature_1_in_log_and_report(data, tmp_path, caplog):
    caplog.set_level("INFO", "referral")
    students = {"main": SHORT | {"answers_mass": 0.0}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(targets, "LEAST", 1)
        far = run_all(tmp_path / "run", config_of(data, students, "train.steps=60"))
    log = next(far.root.glob("students/main/attempts/*/log-0.txt")).read_text()
    assert log.count("warning: at T = 1") == 1
    assert "warning: at T = 1 what is kept of the 24 classes is" in log
    assert 'set students.NAME.answers = "live", or store more (answers_mass' in log
    assert "That is far: with answers" in (far.root / "report.html").read_text()


def test_a_temperature_that_was_not_measured_when_answers_were_stored_is_measured(run):
    session = session_of(run)
    stage = run.targets_for("stored")
    notes = read_json(stage.path("train/answers.json"))
    measured = targets.measured_kl(session, "stored", stage)
    assert measured == pytest.approx(notes["truncation_kl"]["2"], rel=1e-3)
    known = notes["truncation_kl"].pop("2")
    write_json(stage.path("train/answers.json"), notes)
    altered(stage)
    summary = targets.answers_summary(session_of(run), "stored")
    notes["truncation_kl"]["2"] = known
    write_json(stage.directory / "train" / "answers.json", notes)
    altered(stage)
    assert summary is not None and summary["kl"] == pytest.approx(known, rel=1e-3)


@pytest.mark.parametrize("name", ["stored", "live"])
def test_measuring_a_teacher_draws_nothing_from_the_trainings_random_state(run, name):
    before = torch.get_rng_state()
    assert targets.answers_summary(session_of(run), name) is not None
    assert torch.equal(torch.get_rng_state(), before)


def test_a_teacher_that_knows_train_by_heart_is_named():
    assert targets.known_by_heart({"seen": 0.6, "val": 1.0}) == []
    assert targets.known_by_heart({"seen": 0.001, "val": 0.05}) == []  # it is sure of val, too
    assert targets.known_by_heart(None) == []
    (line,) = targets.known_by_heart({"seen": 0.02, "val": 1.35})
    assert line.startswith(
        "warning: the teacher has memorised train: its predictions have an entropy"
    )
    assert "0.02 nats about what the student sees and 1.4 about val" in line
    assert 'perturb = "mix_bags"' in line


# Live


def losses(run, name, batch, network=None):
    """The loss of a student's objective and its gradient, of one network for all students."""
    session = session_of(run)
    schedule = run.config.students[name]
    network = network or student_network(session, "stored", schedule)
    stream, _ = student.student_stream(session, schedule, transfer=True)
    objective = student.soft_objective(session, name, network, stream)
    network.train().zero_grad()
    loss = objective(network, batch)
    loss.backward()
    return loss.detach(), network.linear_head.weight.grad.clone()


def test_live_answers_teach_what_stored_ones_of_all_classes_do(run, data, tmp_path):
    students = {key: STUDENTS[key] for key in ("stored", "live")}
    students["stored"] = students["stored"] | {"answers_mass": 1.0}
    shutil.copytree(run.root, tmp_path / "run", symlinks=True)
    whole = run_all(tmp_path / "run", config_of(data, students), ["targets"])
    batch = batch_of(whole)
    assert read_rows(whole.targets_for("stored"), batch.ids.numpy()).counts is None
    (stored, g), (live, h) = (losses(whole, name, batch) for name in students)
    # float16 rounds a logarithm of 10 by .004
    torch.testing.assert_close(stored, live, rtol=2e-3, atol=1e-4)
    torch.testing.assert_close(g, h, rtol=2e-2, atol=2e-5)


def test_a_live_geometric_mean_is_the_members(run):
    batch = batch_of(run)
    loss, gradient = losses(run, "geometric", batch)
    network = student_network(session_of(run), "stored", run.config.students["geometric"])
    p = average_members(exact(run, batch.inputs), "geometric")
    log_q = network.train()(batch.inputs).log_softmax(1)
    expected = torch.nn.functional.kl_div(log_q, p, reduction="batchmean")
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradient, network.linear_head.weight.grad, rtol=1e-3, atol=1e-6)


def test_a_live_teacher_sees_the_very_view_that_the_student_sees(run, data, tmp_path, monkeypatch):
    config = config_of(data, {"main": SHORT}, "data.augment=shift")
    augmented = RunDirectory(tmp_path, config)
    session = session_of(augmented)
    asked, seen = [], []
    network = student_network(session, "main", config.students["main"])
    network.trunk.register_forward_pre_hook(lambda _, args: seen.append(args[0]))

    def predict(raw):
        asked.append(raw)
        return torch.full((1, len(raw), NUM_CLASSES), 1 / NUM_CLASSES)

    monkeypatch.setattr(student, "find_teacher", lambda *_: teachers.Teacher(predict, 1))
    stream, _ = student.student_stream(session, config.students["main"], True)
    objective = student.soft_objective(session, "main", network, stream)
    batch = stream.batch(3)
    objective(network, batch)
    torch.testing.assert_close(network.preprocess(asked[0]), seen[0])
    plain, _ = session.shards("train").read(batch.ids.numpy())
    assert not np.array_equal(asked[0].numpy(), plain)  # it is a view, not the input itself


def test_a_student_of_live_teachers_resumes_as_if_nothing_had_been(run, data, tmp_path):
    students = {
        "live": SHORT | {"answers": "live", "mean": "geometric", "checkpoint_every": 4},
    }
    config = config_of(data, students, "data.augment=shift")
    whole = run_all(tmp_path / "whole", config, ["generalist", "member", "ensemble", "student"])
    begun = run_all(tmp_path / "begun", config, ["generalist", "member", "ensemble"])
    objective, calls, dies_at = student._as_logits, [], 7

    def dies(*given):
        calls.append(1)
        if len(calls) == dies_at:
            raise KeyboardInterrupt
        return objective(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(student, "_as_logits", dies)
        with pytest.raises(KeyboardInterrupt):
            run_all(begun.root, config, ["student"])
    calls.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(student, "_as_logits", lambda *given: calls.append(1) or objective(*given))
        run_all(begun.root, config, ["student"])
    assert len(calls) == 6  # steps 4 to 9, from the checkpoint of step 4
    weights = [r.students["live"].path("model.safetensors").read_bytes() for r in (whole, begun)]
    assert weights[0] == weights[1]


# Storing


def test_interrupted_answers_go_on_where_they_stopped(run, data, tmp_path, monkeypatch):
    monkeypatch.setattr(targets, "LEAST", 2)
    monkeypatch.setattr(targets, "BLOCK_BYTES", 2**10)
    monkeypatch.setattr(targets, "measuring_batch", lambda num_classes: 100)
    students = {"main": SHORT | {"views": 2, "augment": "shift", "temperature": 3.0}}
    config = config_of(data, students)
    stages = ["generalist", "member", "ensemble"]
    whole, begun = (run_all(tmp_path / name, config, stages) for name in ("whole", "begun"))
    run_all(whole.root, config, ["targets"])
    measured, calls = Session.measured, []

    def dies(session, *rest, **more):
        calls.append(1)
        if len(calls) == 13:
            raise KeyboardInterrupt
        return measured(session, *rest, **more)

    monkeypatch.setattr(Session, "measured", dies)
    with pytest.raises(KeyboardInterrupt):
        run_all(begun.root, config, ["targets"])
    assert not begun.targets_for("main").is_done
    run_all(begun.root, config, ["targets"])
    # 960 samples in blocks of 100, two views, and val once
    assert len(calls) == 13 + 2 * 10 - 12 + 1
    names = ["indices.bin", "log_values.bin", "starts.npy", "counts.npy", "log_tail.npy"]
    for name in (*names, "answers.json"):
        both = [r.targets_for("main").path(f"train/{name}").read_bytes() for r in (whole, begun)]
        assert both[0] == both[1], name


def test_answers_of_earlier_versions_are_read_as_they_are(run, tmp_path):
    """Schemas 1 and 2: k classes in every row, in arrays [N, K, k]."""
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(NUM_CLASSES) * 0.3, (6, 2))
    indices = np.argsort(-p, axis=-1)[..., :4]
    values = np.take_along_axis(p, indices, -1)
    np.save(tmp_path / "indices.npy", indices.astype(np.uint16))
    np.save(tmp_path / "log_values.npy", np.log(values).astype(np.float16))
    np.save(tmp_path / "log_tail.npy", np.log(1 - values.sum(-1)).astype(np.float16))
    read = stored_targets.fixed_rows(tmp_path)
    kept = stored_targets.restored(read(np.array([5, 0])), NUM_CLASSES, "cpu")
    assert kept.counts is None and kept.indices.shape == (2, 2, 4)
    expected = np.repeat(((1 - values.sum(-1)) / 20)[..., None], NUM_CLASSES, -1)
    np.put_along_axis(expected, indices, values, -1)
    got = kept.spread().numpy()
    np.testing.assert_allclose(got, expected[[5, 0]].swapaxes(0, 1), rtol=5e-3, atol=1e-5)


def test_two_sources_of_a_batch_are_read_each_from_its_own_rows():
    def part(rows, width):
        shape = (rows, 1, width)
        return stored_targets.Stored(
            np.full(shape, width, np.int64),
            np.zeros(shape, np.float16),
            np.full((rows, 1), -width, np.float16),
            np.full((rows, 1), width, np.int64),
        )

    places = [np.array([0, 3]), np.array([1, 2, 4])]
    whole = stored_targets.interleaved([part(2, 5), part(3, 2)], places)
    assert whole.counts[:, 0].tolist() == [5, 2, 2, 5, 2]
    assert whole.log_tail[:, 0].tolist() == [-5, -2, -2, -5, -2]
    assert np.isneginf(whole.log_values[1, 0, 2:]).all() and (whole.indices[0, 0] == 5).all()


def test_a_row_keeps_fewer_classes_where_the_bytes_are_few_and_never_less_than_32():
    """Of 70,000 classes an index and a value take 6 bytes, of 1,000 4."""
    assert targets.most_classes(1000, 100, 100 * 4 * 500, "x") == 500
    assert targets.most_classes(1000, 100, 10**9, "x") == 1000
    assert targets.most_classes(70_000, 100, 100 * 6 * 33 + 5, "x") == 33
    assert targets.most_classes(20, 100, 100 * 4 * 20, "x") == 20
    with pytest.raises(UserError, match=r"32 classes of 100 predictions take 12,800 bytes.*live"):
        targets.most_classes(1000, 100, 100 * 4 * 32 - 1, "x")


# What is configured


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["students.a.answers=live", "students.a.views=2"], "leave one of them out"),
        (
            ["students.a.answers=stored", "data.augment=shift"],
            'each view of augment = "shift" is new; set students.a.views = 4',
        ),
        (["students.a.answers=stored", "students.a.perturb=gaussian"], "one of answers and"),
        (["students.a.wrong_weight=1", "students.a.method=hard"], "needs a teacher who"),
        (["students.a.wrong_weight=1", "students.a.perturb=gaussian"], "one of wrong_weight and"),
        (["students.a.answers=sometimes"], "students.a.answers"),
        (["students.a.answers_mass=1.5"], "students.a.answers_mass"),
        (
            ["students.a.augment_share=0.5", "data.augment=shift"],
            'augment_share is of augment = "drop_ngrams", and it is "shift"',
        ),
    ],
)
def test_what_answers_cannot_be_combined_with_is_one_line(overrides, words):
    with pytest.raises(UserError, match=words):
        load_config(None, overrides)


@pytest.mark.parametrize(
    "overrides, mean",
    [
        ([], "arithmetic"),
        (["ensemble.kind=deep"], "arithmetic"),
        (["ensemble.kind=deep", "ensemble.combine=geometric"], "geometric"),
        (
            ["ensemble.kind=deep", "ensemble.combine=geometric", "students.a.mean=arithmetic"],
            "arithmetic",
        ),
        (
            ["ensemble.kind=deep", "ensemble.combine=geometric", "students.a.teacher=generalist"],
            "arithmetic",
        ),
    ],
)
def test_a_student_learns_the_mean_by_which_the_ensemble_is_joined(overrides, mean):
    config = load_config(None, ["students.a.steps=5", *overrides])
    assert config.students["a"].mean == mean
    assert load_config(None, [], json.loads(json.dumps(config.dump()))) == config


def test_targets_that_are_not_of_these_rows_or_classes_are_damage(run, tmp_path):
    """Their checksums may be right: somebody else made them."""
    stage = run.targets_for("less")
    members = read_json(stage.path("train/answers.json"))["members"]
    count = len(np.load(stage.path("train/starts.npy"))) // members
    for name, array in (
        ("starts", np.full(count * members, 2**40)),
        ("counts", np.full(count * members, -1)),
        ("starts", np.zeros(3, np.int64)),
        ("log_tail", np.zeros((count * members, 2), np.float16)),
    ):
        copy = tmp_path / "copy"
        shutil.copytree(stage.path("train"), copy)
        np.save(copy / f"{name}.npy", array)
        with pytest.raises(DamagedFile, match=r"copy/\w+.npy is damaged"):
            stored_targets.rows_by_mass(copy, NUM_CLASSES, members, count)
        shutil.rmtree(copy)
    with pytest.raises(DamagedFile, match=r"\d+ rows, of"):
        stored_targets.rows_by_mass(stage.path("train"), NUM_CLASSES, members, count + 1)
    read = stored_targets.rows_by_mass(stage.path("train"), 2, members, count)
    with pytest.raises(DamagedFile, match="a class beyond the 2"):
        read(np.arange(8))
