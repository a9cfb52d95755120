"""What the rows of the huge benchmark say of a stage that was interrupted."""

from benchmarks import huge


def test_of_a_stage_that_went_on_times_add_up_and_the_larger_peak_counts():
    before = {"seconds": 2.0, "cpu_s": 1.5, "peak_bytes": 300}
    after = {"seconds": 0.5, "cpu_s": 0.25, "peak_bytes": 200}
    assert huge.together(after, before) == {"seconds": 2.5, "cpu_s": 1.75, "peak_bytes": 300}


def test_cost_that_grows_tenfold_for_ten_times_the_classes_is_linear():
    def run(classes, cpu_s):
        return {"classes": classes, "stages": {"measure": {"cpu_s": cpu_s}}}

    grown = huge.exponents(run(100, 3.0), run(1000, 30.0))
    assert abs(grown["measure"] - 1) < 1e-12
