"""The command `referral`, and `python -m launch`."""

import signal
import sys

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # While modules are loaded Ctrl-C ends the process as it ends any other; `main` says more.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def main() -> int:
    from .cli import main

    return main()


if __name__ == "__main__":
    sys.exit(main())
