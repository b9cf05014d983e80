"""`python -m graphopt`, which is how torchrun starts it."""

from graphopt.cli.commands import main

if __name__ == "__main__":
    main()
