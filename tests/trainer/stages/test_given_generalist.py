"""A run that starts at the clusters, with weights that somebody else trained."""

import pytest
import torch
from running import run_all
from toy import toy_config, write_toy

from networks import load_classifier
from pipeline.config import UserError


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def weights(data, tmp_path_factory):
    """What torch.save left of the trunk's own names and a head called fc."""
    run = run_all(tmp_path_factory.mktemp("theirs"), toy_config(data), only={"generalist"})
    state = load_classifier(run.generalist.path("model.json").parent).state_dict()

    def their_name(name):
        return name.removeprefix("trunk.").replace("head.", "fc.")

    theirs = {their_name(name): value for name, value in state.items()}
    path = tmp_path_factory.mktemp("weights") / "theirs.pt"
    torch.save({"state_dict": theirs}, path)
    return path, state


def test_a_run_starts_at_the_clusters_with_someone_elses_weights(data, weights, tmp_path):
    path, state = weights
    config = toy_config(data, f"generalist.from={path}", "generalist.head=fc")
    run = run_all(tmp_path / "run", config, only={"generalist", "measure", "cluster"})
    taken = load_classifier(run.generalist.path("model.json").parent).state_dict()
    assert all(torch.equal(taken[name], value) for name, value in state.items())
    assert run.cluster.is_done


def test_a_file_without_the_heads_name_says_what_is_missing(data, weights, tmp_path):
    config = toy_config(data, f"generalist.from={weights[0]}")
    message = "say what its last linear layer is called: generalist.head"
    with pytest.raises(UserError, match=message):
        run_all(tmp_path / "run", config, only={"generalist"})
