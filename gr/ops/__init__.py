"""Operators, one folder each: reference.py is the definition, and faster paths stand beside it."""
