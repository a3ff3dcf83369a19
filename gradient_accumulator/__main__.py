"""`python -m gradient_accumulator`: the command line."""

import sys

from gradient_accumulator.cli import main

if __name__ == "__main__":
    sys.exit(main())
