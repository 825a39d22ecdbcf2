"""Entrypoint of a Ray job for a search, equivalent to `ptuning search`."""

import sys

from ptuning.__main__ import main

if __name__ == "__main__":
    sys.argv[1:1] = ["search"]
    main()
