"""Entrypoint of a Ray job for serving, equivalent to `ptuning serve`."""

import sys

from ptuning.__main__ import main

if __name__ == "__main__":
    sys.argv[1:1] = ["serve"]
    main()
