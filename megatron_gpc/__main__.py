"""`python -m megatron_gpc` is `megatron-gpc`."""

import sys

from megatron_gpc.cli import main

if __name__ == "__main__":  # checkpoint writers are spawned and import this file again
    sys.exit(main())
