"""`megatron-gpc convert hf-to-megatron`, under the name of a script."""

import sys

from megatron_gpc.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "hf-to-megatron", *sys.argv[1:]]))
