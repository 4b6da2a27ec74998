"""A run from one settings file."""
