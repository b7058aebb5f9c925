"""`python -m replicate`."""

import sys

from replicate.cli import main

if __name__ == "__main__":
    sys.exit(main())
