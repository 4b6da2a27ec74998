"""Benchmarks: what TinyLoRA costs beside PEFT, as ratios within one run; ``make bench`` runs them all."""
