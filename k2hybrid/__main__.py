"""`python -m k2hybrid` is the `k2hybrid` command."""

import sys

from k2hybrid.cli import main

if __name__ == "__main__":
    sys.exit(main())
