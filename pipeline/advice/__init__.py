"""Which lever pays: what pilots of a trained generalist say, before anything is paid for in full."""
