"""`python -m lcpatch.cli`, for where the package is not installed."""

import sys

from . import main

if __name__ == "__main__":
    sys.exit(main())
