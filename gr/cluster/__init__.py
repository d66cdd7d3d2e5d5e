"""What measures machines: checks before a run (preflight), links between ranks, figures for a topology (calibrate)."""
