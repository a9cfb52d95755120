"""Someone else's weights in a network of ours."""

import argparse
import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from networks import InputSpec, ModelSpec, adopt_weights, build_classifier


class Theirs(nn.Module):
    """A network as people have them: a body of some names, and `fc`."""

    def __init__(self, bias=True):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 5, bias=bias)

    def features(self, x):
        return self.norm(self.conv(x)).relu().mean(dim=(2, 3))

    def forward(self, x):
        return self.fc(self.features(x))


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)

    forward = Theirs.features


def ours(classes=5):
    spec = ModelSpec("their:body", classes, InputSpec(shape=(1, 8, 8), mean=[0.5], std=[0.25]))
    return build_classifier(spec, {"their:body": lambda shape: Body()})


def prefixed(prefix, state):
    return {f"{prefix}{name}": value for name, value in state.items()}


def head_apart(prefix, state):
    """The body behind a prefix, the head without: `self.backbone` beside `self.fc`."""
    return {name if "fc" in name else f"{prefix}{name}": value for name, value in state.items()}


def averaged(state):
    """An average that learnt something, beside weights that did not."""
    worse = {name: torch.zeros_like(value) for name, value in state.items()}
    return {"state_dict": worse, "state_dict_ema": state, "epoch": 3}


FORMS = {
    "plain": dict,
    "state_dict": lambda s: {"state_dict": s, "epoch": 3, "best_acc1": torch.tensor(0.5)},
    "model": lambda s: {"model": s, "optimizer": {"state": {0: {"m": torch.ones(3)}}}},
    "model_state_dict": lambda s: {"model_state_dict": s, "optimizer_state_dict": {"state": {}}},
    "net": lambda s: {"net": s, "acc": 93.1},
    "any one": lambda s: {"my_weights": s, "lr_schedulers": [{"last_epoch": 2}]},
    "nested wrappers": lambda s: {"checkpoint": {"model": s}},
    "averaged": averaged,
    "ema shadow": lambda s: {"ema": {"shadow": s, "decay": 0.99}},
    "averaged model": lambda s: {**prefixed("module.", s), "n_averaged": torch.tensor(7)},
    "module": lambda s: prefixed("module.", s),
    "compiled": lambda s: prefixed("_orig_mod.", s),
    "ddp of compiled": lambda s: prefixed("module._orig_mod.", s),
    "compiled ddp": lambda s: prefixed("_orig_mod.module.", s),
    "a part compiled": lambda s: {n.replace("conv.", "conv._orig_mod."): v for n, v in s.items()},
    "a part checkpointed": lambda s: {
        f"module.{name}".replace("norm.", "norm._checkpoint_wrapped_module."): value
        for name, value in s.items()
    },
    "lightning": lambda s: {"state_dict": prefixed("model.", s), "callbacks": {"c": {"x": 1}}},
    "a name of their own": lambda s: prefixed("learner.net.student.", s),
    "backbone apart": lambda s: head_apart("backbone.", s),
    "encoder apart, in module": lambda s: prefixed("module.", head_apart("encoder.", s)),
    "half": lambda s: {name: value.half() for name, value in s.items()},
    "bf16": lambda s: {name: value.bfloat16() for name, value in s.items()},
    "double": lambda s: {name: value.double() for name, value in s.items()},
    "no counters": lambda s: {name: value for name, value in s.items() if "num_b" not in name},
    "parameters": lambda s: {name: nn.Parameter(v, v.is_floating_point()) for name, v in s.items()},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [True, False])
def test_the_same_logits_come_from_a_checkpoint_of_any_common_form(tmp_path, form, bias):
    theirs, mine = Theirs(bias), ours()
    torch.save(FORMS[form](theirs.state_dict()), tmp_path / "weights.pt")
    assert adopt_weights(mine, tmp_path / "weights.pt", "fc").with_head
    raw = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    tolerance = {"atol": 0.05, "rtol": 0.05} if form in ("half", "bf16") else {}
    expected = theirs.eval()((raw / 255 - 0.5) / 0.25)
    torch.testing.assert_close(mine.eval()(raw), expected, **tolerance)
    assert all(p.dtype == torch.float32 for p in mine.parameters())


@pytest.mark.parametrize("form", FORMS)
def test_without_a_heads_name_their_body_comes_and_the_head_stays_fresh(tmp_path, form):
    theirs, mine = Theirs(), ours(classes=3)
    torch.save(FORMS[form](theirs.state_dict()), tmp_path / "weights.pt")
    before = mine.head.weight.clone()
    adoption = adopt_weights(mine, tmp_path / "weights.pt")
    assert not adoption.with_head and torch.equal(mine.head.weight, before)
    assert any("fc of 5 rows, is left out" in note for note in adoption.notes)
    expected = theirs.conv.weight.to(mine.trunk.conv.weight)
    torch.testing.assert_close(mine.trunk.conv.weight, expected, atol=0.01, rtol=0.01)


def test_a_body_alone_is_adopted(tmp_path):
    theirs, mine = Theirs(), ours()
    body = {name: v for name, v in theirs.state_dict().items() if "fc" not in name}
    torch.save(prefixed("encoder.", body), tmp_path / "body.pt")
    assert not adopt_weights(mine, tmp_path / "body.pt").with_head
    torch.testing.assert_close(mine.trunk.conv.weight, theirs.conv.weight)


def test_a_trunk_that_holds_the_network_under_a_name_takes_the_plain_file(tmp_path):
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Body()

        def forward(self, x):
            return self.inner(x)

    spec = ModelSpec("their:body", 5, InputSpec(shape=(1, 8, 8)))
    mine, theirs = build_classifier(spec, {"their:body": lambda shape: Holder()}), Theirs()
    torch.save(theirs.state_dict(), tmp_path / "weights.pt")
    adopt_weights(mine, tmp_path / "weights.pt", "fc")
    torch.testing.assert_close(mine.trunk.inner.conv.weight, theirs.conv.weight)


def test_a_head_of_other_classes_is_fresh_and_said(tmp_path):
    mine = ours(classes=3)
    torch.save(Theirs().state_dict(), tmp_path / "weights.pt")
    adoption = adopt_weights(mine, tmp_path / "weights.pt", "fc")
    assert not adoption.with_head
    assert adoption.notes == ["the head is fresh: fc is [5, 4], these classes need [3, 4]"]


def test_a_heads_name_may_have_the_prefix_that_all_tensors_share(tmp_path):
    theirs, mine = Theirs(), ours()
    torch.save(prefixed("model.", theirs.state_dict()), tmp_path / "weights.pt")
    assert adopt_weights(mine, tmp_path / "weights.pt", "model.fc").with_head
    torch.testing.assert_close(mine.head.weight, theirs.fc.weight)


def test_averaged_weights_are_preferred_and_others_can_be_chosen(tmp_path):
    theirs, mine = Theirs(), ours()
    torch.save(averaged(theirs.state_dict()), tmp_path / "weights.pt")
    notes = adopt_weights(mine, tmp_path / "weights.pt", "fc").notes
    assert notes == ["took state_dict_ema, not state_dict; generalist.weights chooses another"]
    torch.testing.assert_close(mine.head.weight, theirs.fc.weight)
    adopt_weights(mine, tmp_path / "weights.pt", "fc", "state_dict")
    assert not mine.head.weight.any()


def test_the_same_logits_come_from_safetensors(tmp_path):
    theirs, mine = Theirs(), ours()
    save_file(theirs.state_dict(), tmp_path / "weights.safetensors")
    adopt_weights(mine, tmp_path / "weights.safetensors", "fc")
    torch.testing.assert_close(mine.head.weight, theirs.fc.weight)


def test_weights_in_several_files_are_one_network_by_their_index(tmp_path):
    theirs, mine = Theirs(), ours()
    state = theirs.state_dict()
    parts = [list(state)[0::2], list(state)[1::2]]
    for number, names in enumerate(parts):
        save_file({name: state[name] for name in names}, tmp_path / f"{number}.safetensors")
    file_of = {name: f"{n}.safetensors" for n, names in enumerate(parts) for name in names}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": file_of}))
    assert adopt_weights(mine, index, "fc").with_head
    torch.testing.assert_close(mine.head.weight, theirs.fc.weight)
    torch.testing.assert_close(mine.trunk.conv.weight, theirs.conv.weight)


@pytest.mark.parametrize(
    "content, message",
    [
        ("{}", "no index of weights"),
        ("[1]", "no index of weights"),
        ('{"weight_map": {"fc.weight": "../a.safetensors"}}', "is no file beside it"),
        ('{"weight_map": {"fc.weight": "none.safetensors"}}', "cannot be read"),
        ('{"weight_map": {"fc.w": "a.safetensors"}}', "has no fc.w, which"),
    ],
)
def test_an_index_of_what_is_not_there_is_refused(tmp_path, content, message):
    save_file(Theirs().state_dict(), tmp_path / "a.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(content)
    with pytest.raises(ValueError, match=message):
        adopt_weights(ours(), index, "fc")


@pytest.mark.parametrize("end", ["safetensors", "pt"])
def test_a_pointer_of_git_lfs_is_called_one(tmp_path, end):
    path = tmp_path / f"weights.{end}"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 12\n")
    with pytest.raises(ValueError, match="pointer of Git LFS.*git lfs pull"):
        adopt_weights(ours(), path, "fc")


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("conv.weight", lambda v: v * float("nan"), "trunk.conv.weight holds NaN"),
        ("fc.weight", lambda v: v / 0, "head.weight holds NaN, infinity"),
        ("conv.weight", lambda v: v.double() * 1e300, "beyond float32"),
        ("norm.running_var", lambda v: v - 9, "is a variance below 0"),
        ("fc.weight", lambda v: v.to_sparse(), "head.weight is not stored as plain numbers"),
        ("conv.weight", lambda v: v.to("meta"), "trunk.conv.weight is not stored as plain"),
    ],
)
def test_weights_that_nothing_can_learn_from_are_refused(tmp_path, name, change, message):
    mine, before = ours(), ours().state_dict().keys()
    kept = {key: value.clone() for key, value in mine.state_dict().items()}
    state = Theirs().state_dict()
    torch.save({**state, name: change(state[name])}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=message):
        adopt_weights(mine, tmp_path / "weights.pt", "fc")
    assert before == kept.keys()
    assert all(torch.equal(value, kept[key]) for key, value in mine.state_dict().items())


def test_a_part_of_a_larger_model_is_proposed_where_it_has_the_head(tmp_path):
    state = {"state_dict": {**prefixed("model.", STATE), "criterion.weight": torch.ones(5)}}
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match='generalist.prefix = "model."'):
        adopt_weights(ours(), tmp_path / "weights.pt", "fc")
    assert adopt_weights(ours(), tmp_path / "weights.pt", "fc", prefix="model.").with_head


def named(classes):
    spec = ModelSpec("their:body", 5, InputSpec(shape=(1, 8, 8)), class_names=classes)
    return build_classifier(spec, {"their:body": lambda shape: Body()})


def test_rows_of_the_same_classes_are_put_into_their_order(tmp_path):
    theirs, mine = Theirs(), named(("ant", "bee", "caf\xe9", "dog", "eel"))
    torch.save(theirs.state_dict(), tmp_path / "weights.pt")
    rows = ["eel", "ant", "bee", "cafe\u0301", "dog"]
    adoption = adopt_weights(mine, tmp_path / "weights.pt", "fc", row_names=rows)
    torch.testing.assert_close(mine.head.weight, theirs.fc.weight[[1, 2, 3, 4, 0]])
    torch.testing.assert_close(mine.head.bias, theirs.fc.bias[[1, 2, 3, 4, 0]])
    assert any("ant is its row 1 and class 0" in note for note in adoption.notes)


def test_rows_of_other_names_are_said_and_those_at_other_places_refused(tmp_path):
    torch.save(STATE, tmp_path / "weights.pt")
    classes = ("ant", "bee", "cat", "dog", "eel")

    def notes(rows):
        return adopt_weights(named(classes), tmp_path / "weights.pt", "fc", row_names=rows).notes

    assert notes(list(classes)) == []
    (note,) = notes(["ant", "bee", "tiger", "dog", "eel"])
    assert "1 rows of the head are called otherwise" in note and "row 2 is tiger" in note
    with pytest.raises(ValueError, match="row 1 is called ant, which is class 0 here"):
        notes(["bee", "ant", "tiger", "dog", "eel"])


class Evil:
    def __reduce__(self):
        return print, ("owned",)


STATE = Theirs().state_dict()


@pytest.mark.parametrize(
    "content, options, message",
    [
        (STATE, {"head": "classifier"}, "has no classifier.weight; its linear layers are fc"),
        (
            {**STATE, "extra": torch.ones(1)},
            {"head": "fc"},
            "has unexpected extra; its linear layers are none",
        ),
        (
            {**STATE, "a.weight": torch.ones(1, 2), "b.weight": torch.ones(2, 3)},
            {},
            "has unexpected a.weight, b.weight, fc.bias and 1 more; its linear layers are a, b, fc",
        ),
        (
            {"fc.weight": torch.ones(5, 4)},
            {"head": "fc"},
            "lacks conv.bias, conv.weight, norm.bias and 3 more",
        ),
        (
            {**STATE, "conv.weight": torch.ones(4, 3, 3, 3)},
            {"head": "fc"},
            r"conv.weight is \[4, 3, 3, 3\], not \[4, 1, 3, 3\]",
        ),
        (
            {**STATE, "conv.weight": torch.ones(4, 1, 3, 3, dtype=torch.int8)},
            {"head": "fc"},
            "conv.weight is torch.int8, not floating",
        ),
        ([1, 2], {"head": "fc"}, "holds a list, not a state dict"),
        ({"epoch": 3}, {"head": "fc"}, "not a state dict, {name: tensor} is needed; it has epoch"),
        (
            {"student": STATE, "teacher": STATE},
            {"head": "fc"},
            "has weights under student, teacher; say which are meant: generalist.weights",
        ),
        (
            {"state_dict": STATE, "criterion": {"centres": torch.ones(5, 4)}},
            {"head": "fc"},
            "has weights under state_dict, criterion; say which",
        ),
        (
            {"state_dict": STATE, "queue": torch.ones(9, 4)},
            {"head": "fc"},
            "holds tensors at its top and more under state_dict; say which",
        ),
        (
            {"state_dict": STATE, "ema": STATE},
            {"head": "fc", "weights": "model"},
            "has no weights 'model'; under keys of their own: ema, state_dict",
        ),
    ],
)
def test_what_does_not_fit_is_one_clear_error(tmp_path, content, options, message):
    torch.save(content, tmp_path / "weights.pt")
    mine = ours()
    before = mine.head.weight.clone()
    with pytest.raises(ValueError, match=message) as error:
        adopt_weights(mine, tmp_path / "weights.pt", **options)
    assert "\n" not in str(error.value)
    assert torch.equal(mine.head.weight, before)


@pytest.mark.parametrize(
    "content, held",
    [
        ({"state_dict": STATE, "args": argparse.Namespace(lr=1)}, r"\(argparse.Namespace\)"),
        (Theirs(), r"test_adoption.Theirs\)"),
        (Evil(), "more than tensors"),
    ],
    ids=["timm", "a whole module", "code"],
)
def test_what_could_run_code_is_refused_with_a_recipe_that_works(tmp_path, capsys, content, held):
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=f"{held}.*can run code, so they are not read") as error:
        adopt_weights(ours(), tmp_path / "weights.pt", "fc")
    assert "owned" not in capsys.readouterr().out and "\x1b" not in str(error.value)
    sentence, *recipe = str(error.value).splitlines()
    assert len(recipe) == 3 and str(tmp_path / "weights.safetensors") in sentence
    if isinstance(content, Evil):
        return
    exec("\n".join(line.strip() for line in recipe), {})
    assert adopt_weights(ours(), tmp_path / "weights.safetensors", "fc").with_head


def test_a_torchscript_program_is_refused_with_a_recipe_that_works(tmp_path):
    theirs, mine = Theirs(), ours()
    torch.jit.script(nn.Sequential()).save(tmp_path / "empty.pt")
    torch.jit.trace(theirs.eval(), torch.zeros(1, 1, 8, 8)).save(tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="it holds a TorchScript program") as error:
        adopt_weights(mine, tmp_path / "weights.pt", "fc")
    exec("\n".join(line.strip() for line in str(error.value).splitlines()[1:]), {})
    adopt_weights(mine, tmp_path / "weights.safetensors", "fc")
    torch.testing.assert_close(mine.head.weight, theirs.fc.weight)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no more", b"<html>404</html>"])
def test_what_is_no_checkpoint_is_said_in_one_line(tmp_path, content):
    (tmp_path / "weights.pt").write_bytes(content)
    with pytest.raises(ValueError, match="weights.pt: neither safetensors nor") as error:
        adopt_weights(ours(), tmp_path / "weights.pt", "fc")
    assert "\n" not in str(error.value)


def test_safetensors_are_known_by_what_they_hold(tmp_path):
    save_file(Theirs().state_dict(), tmp_path / "weights.bin")
    assert adopt_weights(ours(), tmp_path / "weights.bin", "fc").with_head


def test_a_head_called_new_is_fresh_even_where_theirs_would_fit(tmp_path):
    theirs, mine = Theirs(), ours(classes=5)
    torch.save(theirs.state_dict(), tmp_path / "weights.pt")
    before = mine.head.weight.clone()
    assert not adopt_weights(mine, tmp_path / "weights.pt", "new").with_head
    assert torch.equal(mine.head.weight, before)
    torch.testing.assert_close(mine.trunk.conv.weight, theirs.conv.weight)


def test_a_prefix_takes_one_part_of_a_larger_model(tmp_path):
    theirs, mine = Theirs(), ours()
    parts = prefixed("vision.", theirs.state_dict()) | prefixed("text.", Theirs().state_dict())
    save_file(parts, tmp_path / "both.safetensors")
    with pytest.raises(ValueError, match="generalist.prefix takes the part of a larger model"):
        adopt_weights(mine, tmp_path / "both.safetensors")
    with pytest.raises(ValueError, match="no tensor's name begins with prefix 'x.'; .*text., visi"):
        adopt_weights(mine, tmp_path / "both.safetensors", prefix="x.")
    assert adopt_weights(mine, tmp_path / "both.safetensors", "fc", prefix="vision.").with_head
    torch.testing.assert_close(mine.head.weight, theirs.fc.weight)
