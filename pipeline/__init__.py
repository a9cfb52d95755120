"""The run as data: its config, its stages, its directory, its results.

No torch here: login nodes read it.
"""
