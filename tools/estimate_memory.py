"""`megatron-gpc estimate-memory`, under the name of a script."""

import sys

from megatron_gpc.cli import main

if __name__ == "__main__":
    sys.exit(main(["estimate-memory", *sys.argv[1:]]))
