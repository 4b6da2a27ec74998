"""Benchmarks: what TinyLoRA costs beside PEFT, as ratios within one run; ``make bench`` runs them all.

Other measurements for the book's records are here too; each is run by itself, ``python -m benchmarks.landscape``.
"""
