"""``python -m sollold``."""

import sys

from sollold.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
