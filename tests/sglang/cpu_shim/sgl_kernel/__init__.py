"""Stands for SGLang's CPU kernels, of which PyPI has no build.

Every name can be imported, because SGLang imports many and calls few: without registered operators
its layers take their plain-torch path.  What is called all the same has a body here; anything else
says that it is missing.  Can go when sgl-kernel's CPU build is on PyPI.
"""


def assign_req_to_token_pool_cpu(requests, table, starts, ends, locations, pool_len):
    """Write, for every request, where its tokens start..end lie in the cache into its table row."""
    done = 0
    for row, start, end in zip(requests.tolist(), starts.tolist(), ends.tolist(), strict=True):
        table[row, start:end] = locations[done : done + end - start].to(table.dtype)
        done += end - start


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args, **kwargs):
        raise NotImplementedError(f"sgl_kernel.{name}: not in the stand-in for its CPU build")

    return missing
