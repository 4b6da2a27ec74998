"""Sampling completions and computing their log-probabilities."""
