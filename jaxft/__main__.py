"""`python -m jaxft` is the command line."""

from jaxft.cli import main

if __name__ == "__main__":
    main()
