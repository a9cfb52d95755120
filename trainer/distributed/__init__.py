"""Ranks, how they are started, and how they end."""
