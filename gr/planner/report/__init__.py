"""Reports on a plan for people: one screen for the terminal and one HTML page."""

from gr.planner.report.page import page
from gr.planner.report.terminal import summary

__all__ = ["page", "summary"]
