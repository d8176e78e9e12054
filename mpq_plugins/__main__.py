"""`python -m mpq_plugins` is the command `mpq`, for launchers that take a module."""

import sys

from mpq_plugins._cli import main

sys.exit(main())
