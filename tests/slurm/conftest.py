"""One Slurm for all tests of a session, with runs of the toy and of a fake trainer on it."""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from cluster import Cluster, what_is_missing  # noqa: E402
from patient import Patient  # noqa: E402

# It is called as `python -P -m trainer STAGE ...`, or with torchrun's module, its options and `--`
# before the stage: then it says how many ranks it would start on this node.
FAKE = """#!/bin/sh
shift 2
launcher=$1
shift
while [ "$launcher" != trainer ] && [ "$1" != -- ]; do
    if [ "$1" = --nproc-per-node ]; then echo "$2 ranks, $SLURM_GPUS_ON_NODE GPUs"; fi
    shift
done
if [ "$launcher" != trainer ]; then shift; fi
exec "{python}" "{trainer}/fake_trainer.py" "$@"
"""
MAX_ARRAY_SIZE = 4  # so that five specialists need two arrays


@pytest.fixture(scope="session")
def loopback(request):
    """A running Slurm. Its logs are kept if a test fails."""
    if missing := what_is_missing():
        pytest.skip(missing)
    root = Path(tempfile.mkdtemp(prefix="referral-slurm-", dir="/tmp"))
    root.chmod(0o755)  # munge refuses what others may write
    cluster = Cluster(root, MAX_ARRAY_SIZE)
    before = request.session.testsfailed
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        assert not cluster.processes()
        if request.session.testsfailed == before:
            shutil.rmtree(root)
        else:
            print(f"Slurm's logs: {root}")


@pytest.fixture
def cluster(loopback):
    """Slurm with four idle nodes and no job."""
    yield loopback
    loopback.quiet()


@pytest.fixture
def ward(cluster, tmp_path):
    """A run of five specialists with a fake trainer, without torch: for what needs no metrics."""
    run = Patient(cluster, tmp_path, [str(HERE.parent / "launch" / "faked_referral.py")])
    fake = tmp_path / "python"
    fake.write_text(FAKE.format(python=sys.executable, trainer=HERE.parent / "launch"))
    fake.chmod(0o755)
    site, data = tmp_path / ".config" / "referral" / "site.sh", tmp_path / "data"
    site.parent.mkdir(parents=True)
    site.write_text(f'python="{fake}"\n')
    data.mkdir()
    splits = {split: {"samples": 0, "shards": []} for split in ("train", "val", "test")}
    (data / "manifest.json").write_text(
        json.dumps({"schema": 1, "classes": [*"abcdefgh"], "splits": splits})
    )
    run.config.write_text(f"""
data = {{ train = "{data}", val = "{data}", test = "{data}" }}
train = {{ steps = 10 }}
clusters = {{ num_groups = 5 }}
controls = {{ enabled = false }}
launch = {{ retries = 1 }}
engine = {{ device = "cpu" }}
""")
    return run


@pytest.fixture(autouse=True)
def _no_foreign_slurm(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_"))]:
        monkeypatch.delenv(name)
