"""`python -m mpq_plugins` is the command `mpq`, for launchers that take a module."""

import sys

from mpq_plugins.cli.parser import main

sys.exit(main())
