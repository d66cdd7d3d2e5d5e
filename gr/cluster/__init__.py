"""Measurements of machines: checks before a run (preflight), links of ranks, figures of a topology (calibrate)."""
