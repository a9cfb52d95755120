"""Keys of DeepSpeed's that a user adds, and those that contradict ours."""

import pytest

from pipeline.config import UserError, load_config
from pipeline.config.deepspeed import merged_deepspeed

OURS = {
    "train_micro_batch_size_per_gpu": 8,
    "gradient_clipping": 0.5,
    "zero_optimization": {"stage": 2, "overlap_comm": False},
    "zero_allow_untested_optimizer": True,
}


def test_further_keys_are_added_and_keys_of_pace_replaced():
    theirs = {
        "zero_optimization": {"overlap_comm": True, "round_robin_gradients": True, "stage": 2},
        "comms_logger": {"enabled": True},
    }
    merged = merged_deepspeed(OURS, theirs)
    assert merged["zero_optimization"] == {
        "stage": 2,
        "overlap_comm": True,
        "round_robin_gradients": True,
    }
    assert merged["comms_logger"] == {"enabled": True}
    assert merged["gradient_clipping"] == 0.5
    assert OURS["zero_optimization"] == {"stage": 2, "overlap_comm": False}


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (
            {"zero_optimization": {"stage": 3}},
            "engine.deepspeed.zero_optimization.stage = 3, but engine.zero_stage makes it 2; "
            "leave it out and set engine.zero_stage",
        ),
        (
            {"gradient_clipping": 1.0},
            "engine.deepspeed.gradient_clipping = 1.0, but train.clip_norm makes it 0.5; "
            "leave it out and set train.clip_norm",
        ),
        (
            {"zero_allow_untested_optimizer": False},
            "engine.deepspeed.zero_allow_untested_optimizer = false, but this program needs true; "
            "leave it out",
        ),
        (
            {"optimizer": {"type": "Lamb"}},
            'engine.deepspeed.optimizer.type = "Lamb", but train.optimizer says it, and nothing is '
            "set here; leave it out and set train.optimizer",
        ),
    ],
)
def test_what_contradicts_ours_is_refused_with_both_values(theirs, message):
    with pytest.raises(UserError) as error:
        merged_deepspeed(OURS, theirs)
    assert str(error.value) == message


def test_keys_of_deepspeed_are_of_its_engine_alone():
    with pytest.raises(UserError, match='is of engine.name = "deepspeed", and it is "ddp"'):
        load_config(None, ["engine.deepspeed={comms_logger={enabled=true}}"])
    zero_3 = ["engine.name=deepspeed", "engine.zero_stage=3", "engine.checkpoint_activations=true"]
    with pytest.raises(UserError, match="whose weights are given back by then; take engine.zero"):
        load_config(None, zero_3)
