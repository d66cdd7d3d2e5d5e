"""Operators: one folder each, with reference.py as the definition and faster paths beside it."""
