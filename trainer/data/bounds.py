"""How much one member of a tar may take, and which files are opened: the limits, in one place.

A tar says itself how long its names, labels and headers are.  Without limits one member of a few
kilobytes makes an index, a class table or a chain of headers of gigabytes.  What exceeds a limit is
corrupt, like any other member that cannot be read: `strict` names it, `skip` counts it.
"""

from __future__ import annotations

from io import BufferedReader
from pathlib import Path

from networks import regular
from pipeline.config import UserError

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

MEMBER_BYTES = 2 * GIB  # content of a member
NAME_BYTES = 4 * KIB  # of a member: as long as a path may be on Linux
LABEL_BYTES = 64 * KIB  # of a label, the member `cls` or a field's value
JSON_BYTES = 4 * MIB  # of the member that the field is read from
HEADERS = 8  # pax and longname headers in front of one member
HEADER_BYTES = MIB  # of all of these together, and of global pax headers in a whole tar
SAMPLE_MEMBERS = 1000  # members with one key
# Of a whole shard.  Beyond these there is no one member to blame, so the shard is refused.
SHARD_MEMBERS = 20_000_000
SHARD_EXTENSIONS = 10_000
CLASSES = 100_000_000  # that the config may say: each has a name in memory


def exceeds(what: str, size: int, limit: int, unit: str = "bytes") -> str:
    """The reason why something is not read. "" where it is within its limit."""
    if size <= limit:
        return ""
    return f"{what} has {size} {unit}, at most {limit} are read"


def abbreviated(name: str) -> str:
    """A name in a message: of one that is too long its beginning."""
    return name if len(name) <= 100 else f"{name[:60]}... ({len(name)} letters)"


def open_regular(path: str | Path) -> BufferedReader:
    """A file open for reading.  Raises OSError, and UserError for what is no regular file.

    Whoever reads a pipe or a device may wait for ever, or read without an end.
    """
    try:
        return regular.open_regular(path)
    except regular.NotRegular as error:
        raise UserError(str(error)) from None


def is_there(path: str | Path) -> bool:
    """Whether there is such a file, or a link to one.

    Raises UserError for what is no regular file, and OSError where the machine cannot say it: a
    disk that fails is no absent file, though os.path.exists takes it for one.
    """
    try:
        regular.check_regular(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except regular.NotRegular as error:
        raise UserError(str(error)) from None
    return True
