"""Thirteen numbers on SmolLM2-135M-Instruct: word problems of one step."""

from __future__ import annotations

from tinylora_lite.lab.registered import registered

CLAIM = registered("real-smollm2", 19, "smollm2-135m", "words-1", seeds=5, tie=17)
