"""Hydra configuration: groups of yaml files, each of them a constructor call."""
