# SPDX-License-Identifier: Apache-2.0
"""`python -m combiner`, the same as the command `combiner`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
