"""`python -m referral` is the command `referral`."""

import sys

from launch.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
