"""``python -m kvant``."""

import sys

from kvant.cli import main

if __name__ == "__main__":
    sys.exit(main())
