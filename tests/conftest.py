"""What all tests share."""

from __future__ import annotations

import ctypes
import sys

from hypothesis import settings

settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")


def pytest_sessionfinish() -> None:
    """Keep sentencepiece's type table for good.

    sentencepiece 0.2.1, which SGLang 0.5.23 pins, frees it at the interpreter's exit after the types it needs for that
    are gone, and the process ends with a segmentation fault, whatever the tests said. Other modules are not looked
    into: an attribute of a lazy one may import sentencepiece only now.
    """
    for name in [name for name in sys.modules if name.startswith("swig_runtime_data")]:
        capsule = vars(sys.modules[name]).get("type_pointer_capsule")
        if capsule is not None:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(capsule))
