"""TinyLoRA: adapting a language model with 13 parameters, trained by reinforcement learning (arXiv 2602.04118).

The public names and where they live are in ``__init__.pyi``. Each is imported when it is first used, so that what needs
no torch starts without it.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
