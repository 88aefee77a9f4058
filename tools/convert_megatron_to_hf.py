"""`megatron-gpc convert megatron-to-hf`, under the name of a script."""

import sys

from megatron_gpc.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "megatron-to-hf", *sys.argv[1:]]))
