"""Runs: configuration, checkpoints, metrics, plots. Import the modules themselves; this file stays empty to stay fast."""
