"""Entrypoint of a Ray job for training, equivalent to `ptuning train`."""

import sys

from ptuning.__main__ import main

if __name__ == "__main__":
    sys.argv[1:1] = ["train"]
    main()
