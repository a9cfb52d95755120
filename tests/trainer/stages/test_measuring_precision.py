"""What measures networks computes their trunks as training does, and answers in float32."""

import numpy as np
import pytest
import torch
from toy import toy_config, write_toy

from networks import InputSpec, ModelSpec, build_classifier
from pipeline.graph import RunDirectory
from trainer.core.dense_logits import predictor_of
from trainer.distributed.ranks import ALONE
from trainer.session import Session


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("data"), {"train": 2, "val": 2, "test": 2})


def measured(data, root, *words):
    session = Session(RunDirectory(root, toy_config(data, *words)), ALONE)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        spec = ModelSpec("convnet", 24, InputSpec((1, 8, 8)), {"width": 4, "embedding": 8})
        network = build_classifier(spec).eval()
    predict = predictor_of(network)

    def measure(batch):
        logits = predict(batch.inputs).materialize()
        features = network.trunk(network.preprocess(batch.inputs))
        low = torch.full((len(batch),), features.dtype == torch.bfloat16)
        return {"logits": logits, "features": features, "low": low}

    return session.measured(session.shards("val"), measure), network


def test_a_trunk_is_measured_in_the_runs_precision_with_float32_logits(data, tmp_path):
    values, network = measured(data, tmp_path, "engine.precision=bf16")
    assert values["low"].all()
    assert values["features"].dtype == values["logits"].dtype == np.float32
    head = network.linear_head
    expected = torch.from_numpy(values["features"]) @ head.weight.T + head.bias
    torch.testing.assert_close(torch.from_numpy(values["logits"]), expected.detach())


def test_without_a_gpu_everything_is_measured_in_float32(data, tmp_path):
    values, _ = measured(data, tmp_path)
    assert not values["low"].any()
