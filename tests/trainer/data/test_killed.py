"""A run killed twice. `make soak` kills one twenty times."""

from killed import judge, the_stream


def test_a_killed_and_resumed_run_sees_the_tensors_of_the_uninterrupted_run(tmp_path):
    attempts = judge(tmp_path, kills=2, steps=100, seed=1)
    assert len({(attempt["ranks"], attempt["workers"]) for attempt in attempts}) > 1
    stream = the_stream(tmp_path)
    augmented, stream.augment = stream.batch(0).inputs, None
    plain = stream.batch(0).inputs
    assert augmented.shape == (48, 3, 16, 24)
    changed = (augmented != plain).flatten(1).any(1)
    assert changed.float().mean() > 0.9  # 1 of 5 x 7 x 2 views is the picture itself
