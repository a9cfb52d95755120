"""The method, stage by stage."""
