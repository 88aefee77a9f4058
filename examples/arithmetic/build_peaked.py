"""`build.py --peaked` as a script of its own: model.build names a script without options."""

import sys

import build

if __name__ == "__main__":
    sys.argv.append("--peaked")
    build.main()
