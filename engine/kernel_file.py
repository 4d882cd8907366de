"""A kernel from a file: FILE.py:function."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path


def kernel(text: str) -> str | Callable:
    """The function that FILE.py:function names; any other text is an implementation's name, and stays. What the file
    imports may lie beside it.

    ValueError for a file that is not there or cannot be imported, and for a function that is not in it.
    """
    place, colon, name = text.rpartition(":")
    if not colon or not place.endswith(".py"):
        if text.endswith(".py"):
            raise ValueError(f"{text} names no function: write {text}:FUNCTION")
        return text
    path = Path(place)
    if not path.is_file():
        raise ValueError(f"there is no file {place}")
    module_name = f"microvllm_kernel_file_{abs(hash(path.resolve()))}"
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, path)
        module = sys.modules[module_name] = importlib.util.module_from_spec(spec)
        if (folder := str(path.resolve().parent)) not in sys.path:
            sys.path.append(folder)  # behind all others: a file there may have the name of a module that others import
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[module_name]
            raise ValueError(f"{place} cannot be imported: {type(error).__name__}: {error}") from error
    found = vars(sys.modules[module_name])
    if not callable(found.get(name)):
        functions = [key for key, value in found.items() if callable(value) and value.__module__ == module_name]
        raise ValueError(f"{place} has no function {name!r}; it has: {', '.join(functions) or 'none'}")
    return found[name]


def swaps(texts: list[str]) -> dict[str, str | Callable]:
    """By operator, from texts OP=NAME or OP=FILE.py:function."""
    found = {}
    for text in texts:
        op, equals, name = text.partition("=")
        if not equals:
            raise ValueError(f"--kernel {text} must read OP=NAME or OP=FILE.py:FUNCTION")
        found[op] = kernel(name)
    return found
