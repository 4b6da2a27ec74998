"""Training: one loop, the objectives GRPO and SFT, and what is built on them."""
