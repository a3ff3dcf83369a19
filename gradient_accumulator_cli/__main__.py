"""`python -m gradient_accumulator_cli`: the command line."""

import sys

from gradient_accumulator_cli.command import main

if __name__ == "__main__":
    sys.exit(main())
