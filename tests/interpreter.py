"""Triton's interpreter, without what it does anew at each call and operation: over half of the time of kernels."""

import inspect
from collections.abc import Callable
from functools import cache
from types import ModuleType


def hasten() -> None:
    """Has it look for the language's functions once, patch them once a launch, and keep NumPy's types by name."""
    from triton.runtime import interpreter  # Where there is no Triton, nothing else here is needed.

    tl, patch_lang, np_dtype_of = interpreter.tl, interpreter._patch_lang, interpreter._get_np_dtype
    np_dtypes = {}

    @cache
    def builtins_of(package: ModuleType | type) -> list[tuple[str, object]]:
        return [(name, member) for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]

    def patch_builtin(package: ModuleType | type, builder: object, scope: object) -> None:
        for name, member in builtins_of(package):
            if getattr(package, name) is member:
                interpreter._patch_attr(package, name, member, builder, scope)

    @cache
    def languages_of(function: Callable) -> list[ModuleType]:
        return [value for value in function.__globals__.values() if value is tl or value is tl.core]

    def patch_languages(function: Callable) -> object:
        """Of a function that a kernel calls, what the launch has patched already is left as it is."""
        patched = not any(tl.core.is_builtin(language.load) for language in languages_of(function))
        return interpreter._LangPatchScope() if patched else patch_lang(function)

    def np_dtype(dtype: object) -> object:
        element = dtype.scalar
        if element.is_ptr():
            return np_dtype_of(element)
        if element.name not in np_dtypes:
            np_dtypes[element.name] = np_dtype_of(element)
        return np_dtypes[element.name]

    if patch_lang.__module__ != __name__:
        interpreter._patch_builtin, interpreter._patch_lang = patch_builtin, patch_languages
        interpreter._get_np_dtype = np_dtype
