"""What a Ray job runs to search: the same as `ptuning search`."""

import sys

from ptuning.__main__ import main

if __name__ == "__main__":
    sys.argv[1:1] = ["search"]
    main()
