"""TinyLoRA in other training engines: TRL, verl, ``accelerate``, and plain PyTorch."""

from tinylora_lite.engines.optimizer import TinyLoraAdamW as TinyLoraAdamW
from tinylora_lite.engines.optimizer import as_lora as as_lora
