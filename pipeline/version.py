"""What this software is called on a package index, and its version, which stands here alone.

pyproject.toml reads VERSION without importing anything.
"""

DISTRIBUTION = "referral-classifiers"  # `referral` is somebody else's there. The command is ours
VERSION = "0.1.0"
