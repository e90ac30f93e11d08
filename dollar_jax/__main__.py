"""`python -m dollar_jax` is `dollar`."""

from dollar_jax.cli import main

if __name__ == "__main__":
    main()
