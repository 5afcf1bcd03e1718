"""Annotations as checks of every call, without what jaxtyping's own decorator costs: a quarter of the suite's time.

That one binds the operands to a signature and checks them twice, for what it says when they are wrong, and compiles
checks anew for each closure: those have none here.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import wraps
from types import FunctionType

import jaxtyping

_context = jaxtyping.jaxtyped


def check_annotations(*packages: str) -> AbstractContextManager:
    """Has beartype check what functions and dataclasses of these packages, yet to be imported, are given and return."""
    jaxtyping.jaxtyped = _checked
    return jaxtyping.install_import_hook(packages, "beartype.beartype")


def _checked(*, typechecker: Callable[[Callable], Callable]) -> Callable:
    def decorate(member: object) -> object:
        if isinstance(member, type):
            return _context(member, typechecker=typechecker)  # Of a dataclass, the arguments.
        if not isinstance(member, FunctionType) or "<locals>" in member.__qualname__ or not member.__annotations__:
            return member
        checks = typechecker(member)
        has_shapes = "jaxtyping" in repr(list(member.__annotations__.values()))

        @wraps(member)
        def checked(*args: object, **kwargs: object) -> object:
            if jaxtyping.config.jaxtyping_disable:
                return member(*args, **kwargs)
            if has_shapes:
                with _context("context"):  # Axes of one name have one size within a call.
                    return checks(*args, **kwargs)
            return checks(*args, **kwargs)

        return checked

    return decorate
