"""`python -m capi.evaluate`."""

import sys

from capi.evaluate.command import main

if __name__ == "__main__":
    sys.exit(main())
