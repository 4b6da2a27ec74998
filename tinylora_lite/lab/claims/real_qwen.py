"""Thirteen numbers on Qwen2.5-Coder-0.5B-Instruct, of the paper's family: word problems of two steps."""

from __future__ import annotations

from tinylora_lite.lab.registered import registered

CLAIM = registered("real-qwen", 20, "qwen2.5-coder-0.5b", "words-2", seeds=3, tie=13, gsm8k=True)
