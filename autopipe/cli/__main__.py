"""`python -m autopipe.cli`: the same as the console script `autopipe`."""

import sys

from autopipe.cli import main

sys.exit(main())
