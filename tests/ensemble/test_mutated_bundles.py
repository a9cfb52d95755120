"""A damaged bundle is one line with its file's name, and with checksums never another answer."""

import json
import shutil

import pytest
from mutated_bundles import campaign, make, predicted

from ensemble import load_ensemble
from networks.integrity import CHECKSUMS, check_file, write_checksums


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    root = tmp_path_factory.mktemp("bundles")
    return make(root)


@pytest.fixture
def bundle(bundles, tmp_path):
    """A copy of the bundle of copies, without checksums, as older versions wrote them."""
    copy = shutil.copytree(bundles["copies"], tmp_path / "bundle")
    (copy / CHECKSUMS).unlink()
    return copy


def test_eight_mutated_bundles_end_in_answers_or_in_one_line(tmp_path):
    assert campaign(range(8), tmp_path) == []


def test_a_flipped_bit_in_a_weight_is_told_by_the_bundles_checksums(bundles, tmp_path):
    copy = shutil.copytree(bundles["copies"], tmp_path / "bundle")
    path = copy / "specialists" / "001" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    ensemble = load_ensemble(copy)  # specialists are read when they are needed
    with pytest.raises(ValueError, match="001/model.safetensors is damaged.*SHA256SUMS says"):
        ensemble.specialists[1]
    write_checksums(copy)
    check_file(path)


def test_a_damaged_list_of_checksums_is_said_and_one_without_the_file_says_nothing(bundle):
    (bundle / CHECKSUMS).write_text("nothing\n")
    with pytest.raises(ValueError, match="SHA256SUMS is damaged"):
        check_file(bundle / "ensemble.json")
    (bundle / CHECKSUMS).write_text(f"{'0' * 64}  another/file\n")
    check_file(bundle / "ensemble.json")


def forged(bundle, place, **values):
    path = bundle / place
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    "place, values",
    [
        ("generalist/model.json", {"num_classes": 10**9}),
        ("generalist/model.json", {"num_classes": 10**30}),
        ("generalist/model.json", {"options": {"width": 2**30}}),
        ("generalist/model.json", {"options": {"width": 4, "depth": 2**30}}),
        ("generalist/model.json", {"input": {"shape": [2**20, 2**20, 2**20]}}),
        ("generalist/model.json", {"builder": "os:system"}),
        ("generalist/model.json", {"members": {"kind": "heads", "count": 2**30, "blocks": 0}}),
        ("generalist/model.json", {"head": [[]]}),
        ("ensemble.json", {"members": "x"}),
        ("ensemble.json", {"gate": -1}),
        ("ensemble.json", {"temperatures": [1, 1, 0]}),
        ("ensemble.json", {"kind": "deep", "members": 2**31 - 1}),
        ("ensemble.json", {"shared": {"0": ["x"]}}),
        ("clusters/groups.json", {"num_classes": 2**31 - 1}),
        ("clusters/groups.json", {"members": [[10**20]]}),
    ],
)
def test_a_forged_value_costs_one_line_and_neither_time_nor_memory(bundle, bundles, place, values):
    forged(bundle, place, **values)
    code, out, err = predicted(bundle, bundles["copies"].parent / "inputs.npy", student=False)
    assert code == 2 and not out
    (line,) = err.splitlines()
    assert line.startswith("error: ") and str(bundle) in line


def test_json_that_is_nested_too_deep_is_not_json(bundle, bundles):
    (bundle / "generalist" / "model.json").write_text("[" * 100_000)
    code, _, err = predicted(bundle, bundles["copies"].parent / "inputs.npy", student=False)
    assert code == 2 and "generalist/model.json: not valid JSON" in err
