"""Packed embedding tables: rows in fewer bits, and tables over cards."""
