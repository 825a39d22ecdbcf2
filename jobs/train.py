"""What a Ray job runs to train: the same as `ptuning train`."""

import sys

from ptuning.__main__ import main

if __name__ == "__main__":
    sys.argv[1:1] = ["train"]
    main()
