"""Files of adapters: our own, merged weights, LoRA, and PEFT's TinyLoRA."""
