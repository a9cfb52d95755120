"""A disk that is too small for RUN is one line, whatever was being written. Room is enough then."""

import pytest
from filesystems import in_memory, resize, why_not

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(why_not("tmpfs")), reason="no small disk can be mounted"),
]


@pytest.mark.parametrize("kib", [8, 40, 120])
def test_the_launcher_on_a_full_disk_says_so_in_one_line_and_goes_on_with_room(ward, referral, kib):
    config = ward.write_config()
    with in_memory(kib) as disk:
        code, _, err = referral("run", config, "--run", disk / "run")
        (line,) = err.splitlines()
        assert code == 2 and line.startswith(f"error: {disk}") and "the disk is full: " in line
        resize(disk, 4096)
        code, out, err = referral("run", config, "--run", disk / "run")
        assert code == 0, out + err
        assert [path for path in (disk / "run").rglob(".*") if path.name != ".lock"] == []
