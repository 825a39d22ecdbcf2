"""What a Ray job runs to search: the same as `ptuning search`."""

import sys

from ptuning.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["search"]
    main()
