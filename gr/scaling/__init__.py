"""Scaling laws: a grid of ordinary runs, and what their losses say of parameters, tokens and compute.

grid.py has the cells of a grid and runs them, fit.py fits, report.py writes the table and the picture.
"""
