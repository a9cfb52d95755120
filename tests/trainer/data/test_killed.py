"""A run killed twice; `make soak` kills one twenty times."""

from killed import judge, the_stream


def test_a_killed_and_resumed_run_sees_the_tensors_of_the_uninterrupted_run(tmp_path):
    attempts = judge(tmp_path, kills=2, steps=100, seed=1)
    assert len({(attempt["ranks"], attempt["workers"]) for attempt in attempts}) > 1
    assert the_stream(tmp_path).batch(0).inputs.shape == (48, 3, 16, 24)
