"""`python -m djax.cli`: the `djax` command of this interpreter."""

from djax.cli import main

if __name__ == "__main__":
    main()
