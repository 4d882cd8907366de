"""Triton's interpreter, without the work that it repeats within a launch."""

from __future__ import annotations

from triton.runtime import interpreter


def patch_once_a_launch() -> None:
    """The interpreter replaces triton.language's functions by its own when a kernel is launched, and anew whenever that
    calls another function. Here a launch does it once for the kernel's module and for each that it calls into.
    """
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[int] = set()

    def patch_once(fn):
        if id(fn.__globals__) not in patched:
            patched.add(id(fn.__globals__))
            return patch(fn)

    def launch_anew(self, *args, **kwargs):
        patched.clear()
        launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_anew
