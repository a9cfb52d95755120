"""File systems of our own in images, which may be filled or lose their power. Needs root."""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

IMAGE_MIB = 400  # the least that mkfs.xfs takes is 300
MAKE = {
    "ext4": ["mkfs.ext4", "-q", "-F"],
    "xfs": ["mkfs.xfs", "-q", "-f"],
    "btrfs": ["mkfs.btrfs", "-q", "-f"],
}
KINDS = tuple(MAKE)
PATIENCE_S = 30.0
GOING_DOWN = 0x8004587D  # XFS_IOC_GOINGDOWN, which ext4 has too
WITHOUT_FLUSHING = 2


def why_not(kind: str) -> str:
    """What this machine lacks for a file system, "tmpfs" among them. Empty if nothing."""
    if os.geteuid() != 0:
        return "only root may mount"
    if kind in MAKE and not shutil.which(MAKE[kind][0]):
        return f"{MAKE[kind][0]} is not installed"
    try:
        with mounted(kind) if kind in MAKE else in_memory(1024):
            return ""
    except (OSError, subprocess.CalledProcessError) as error:
        return f"{kind} cannot be mounted: {error}"


class Mounted:
    """A file system in an image, mounted at `path`."""

    def __init__(self, kind: str, image: Path, path: Path):
        self.kind, self.image, self.path = kind, image, path

    def mount(self) -> None:
        subprocess.run(["mount", "-o", "loop", self.image, self.path], check=True)

    def unmount(self) -> None:
        unmount(self.path)

    def lose_power(self) -> None:
        """Nothing that is not on the disk yet comes there. Every further access is an error."""
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, GOING_DOWN, struct.pack("I", WITHOUT_FLUSHING))
        finally:
            os.close(descriptor)


@contextmanager
def mounted(kind: str) -> Iterator[Mounted]:
    place = Path(tempfile.mkdtemp(prefix=f"referral-{kind}-"))
    image, path = place / "image", place / "mounted"
    path.mkdir()
    with open(image, "wb") as file:
        file.truncate(IMAGE_MIB << 20)
    try:
        subprocess.run([*MAKE[kind], image], check=True, capture_output=True)
        disk = Mounted(kind, image, path)
        disk.mount()
        try:
            yield disk
        finally:
            disk.unmount()
    finally:
        shutil.rmtree(place, ignore_errors=True)


@contextmanager
def in_memory(kib: int) -> Iterator[Path]:
    """A tmpfs of so many KiB."""
    path = Path(tempfile.mkdtemp(prefix="referral-tmpfs-"))
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", path], check=True)
    try:
        yield path
    finally:
        unmount(path)
        path.rmdir()


def unmount(path: Path) -> None:
    """Once the last process of a trial has let go of it."""
    deadline = time.monotonic() + PATIENCE_S
    while subprocess.run(["umount", path], capture_output=True).returncode:
        assert time.monotonic() < deadline, f"{path} stays in use"
        time.sleep(0.1)


def resize(path: Path, kib: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={kib}k", path], check=True)
