"""`python -m fqt`."""

import sys

from .cli import main

sys.exit(main())
