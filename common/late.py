"""Modules imported when they are first used, as Python 3.15's `lazy import` does.

torch takes two seconds to import. So `--help` answers at once, and processes that only decode never load it.
"""

import importlib


class Late:
    """Stands for the module `name`."""

    def __init__(self, name):
        self.__name = name

    def __getattr__(self, attribute):
        value = getattr(importlib.import_module(self.__name), attribute)
        setattr(self, attribute, value)  # from now on as fast as the module itself
        return value


torch = Late("torch")
