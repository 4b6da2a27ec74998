"""``python -m tinylora_lite`` is ``tinylora``."""

import sys

from tinylora_lite.cli import main

if __name__ == "__main__":
    sys.exit(main())
