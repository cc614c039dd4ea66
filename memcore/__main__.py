"""`python -m memcore` is the `memcore` command."""

import sys

from .cli import main

sys.exit(main())
