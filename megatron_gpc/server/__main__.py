"""`python -m megatron_gpc.server` starts the server of app.py."""

from megatron_gpc.run.imports import many_imports

with many_imports():
    from megatron_gpc.server.app import main

if __name__ == "__main__":
    main()
