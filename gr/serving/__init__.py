"""Serving: what a checkpoint becomes to answer requests."""
