"""Runs the command line as `python -m graftlm`."""

import sys

from graftlm.cli import main

if __name__ == "__main__":
    sys.exit(main())
