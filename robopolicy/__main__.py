"""`python -m robopolicy`: the same as the `robopolicy` command."""

import sys

from robopolicy.app.cli import main

if __name__ == "__main__":
    sys.exit(main())
