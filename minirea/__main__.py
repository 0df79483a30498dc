"""`python -m minirea` is the same as `minirea`."""

import sys

from minirea.cli import main

sys.exit(main())
