"""`megatron-gpc convert prompts`, under the name of a script."""

import sys

from megatron_gpc.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "prompts", *sys.argv[1:]]))
