"""Triton's interpreter, without what it does anew at every call of a function: half of the time of tests of kernels."""

import inspect
from functools import cache
from types import ModuleType


def hasten() -> None:
    """Has it look for the language's functions once; where they are patched already, nothing is left to do."""
    from triton.runtime import interpreter  # Where there is no Triton, nothing else here is needed.

    @cache
    def builtins_of(package: ModuleType | type) -> list[tuple[str, object]]:
        is_builtin = interpreter.tl.core.is_builtin
        return [(name, member) for name, member in inspect.getmembers(package) if is_builtin(member)]

    def patch_builtin(package: ModuleType | type, builder: object, scope: object) -> None:
        for name, member in builtins_of(package):
            if getattr(package, name) is member:
                interpreter._patch_attr(package, name, member, builder, scope)

    if interpreter._patch_builtin.__module__ != __name__:
        interpreter._patch_builtin = patch_builtin
