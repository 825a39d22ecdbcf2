"""`python -m ptuning`: the command line."""

from ptuning.cli import main

main()
