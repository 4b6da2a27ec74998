"""Figures of the book, and the progress of a run in a terminal, a log or a notebook."""
