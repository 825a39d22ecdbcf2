"""What a Ray job runs to train: the same as `ptuning train`."""

import sys

from ptuning.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["train"]
    main()
