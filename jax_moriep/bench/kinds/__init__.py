"""The kinds of runs."""
