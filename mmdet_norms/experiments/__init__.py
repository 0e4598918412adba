"""Experiments: many trainings whose results belong in one table or figure."""

from .grid import Cell, Outcome, run

__all__ = ['Cell', 'Outcome', 'run']
