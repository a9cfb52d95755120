"""The command `referral` with the fake trainer:  python faked_referral.py run ..."""

import sys
from pathlib import Path

import launch.cli

launch.cli.FAKE = [sys.executable, str(Path(__file__).with_name("fake_trainer.py"))]

if __name__ == "__main__":
    sys.exit(launch.cli.main())
