"""The commands that need torch: check, shards, doctor, export, predict, compare."""
