"""Lets torchvision be imported beside a CPU build of torch.

PyPI's torchvision is a CUDA build.  Its C library does not load here, and its import then fails on
operators that were never declared.  Text models call none of them, so a declaration is enough.  Can
go when a CPU build of torchvision is on PyPI.
"""

import contextlib
import importlib.abc
import sys

OPERATORS = ("nms", "qnms")
SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class DeclareOperators(importlib.abc.MetaPathFinder):
    """Finds nothing; declares the operators when torchvision is about to need them."""

    library = None  # torch forgets the declaration with the object

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision._meta_registrations" and self.library is None:
            import torch

            self.library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in OPERATORS:
                with contextlib.suppress(RuntimeError):  # the C library did load
                    self.library.define(operator + SIGNATURE)


sys.meta_path.insert(0, DeclareOperators())
