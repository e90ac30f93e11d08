"""`python -m dollar_jax` is `dollar`."""

import sys

from dollar_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
