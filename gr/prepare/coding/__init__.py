"""Codes for the values of a column, and the order of events, in C++ without torch (reference.py is the definition)."""
