"""The command `referral`, and `python -P -m launch`."""

import sys

from pipeline.interrupts import end_at_once


def main() -> int:
    end_at_once()
    from .cli import main

    return main()


if __name__ == "__main__":
    sys.exit(main())
