"""`megatron-gpc parity`, under the name of a script."""

import sys

from megatron_gpc.cli import main

if __name__ == "__main__":
    sys.exit(main(["parity", *sys.argv[1:]]))
