"""Replacing one symbol of Megatron, everywhere it has been imported to."""

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

from megatron_et.host.versions import checked_versions, megatron_version

replaced: list[str] = []
"""Full names of the symbols that were replaced, in order."""


def find(module_name: str, attribute: str) -> Any:
    """A symbol of Megatron; `attribute` may be dotted (`MoELayer.__init__`).

    Raises:
        ImportError: it does not exist in this version.
    """
    try:
        owner: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            owner = getattr(owner, part)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"{module_name}.{attribute} is not in megatron-core {megatron_version()}, and megatron_et needs "
            f"it: versions that have it are {checked_versions()} ({error})"
        ) from error
    return owner


def require(*names: tuple[str, str]) -> None:
    """Check that symbols which we call or import, (module, attribute) each, are there: at install(), not in
    the first forward pass.

    Raises:
        ImportError: names the first that is not.
    """
    for module_name, attribute in names:
        find(module_name, attribute)


def wrap(module_name: str, attribute: str, make: Callable[[Any], Callable[..., Any]]) -> None:
    """Replace a function of a module by `make(original)`, in every module that already imported it by name.

    `from module import function` leaves copies behind (initialize.py holds validate_args, training.py
    load_checkpoint): they are found by identity.
    """
    original = find(module_name, attribute)
    wrapped = functools.wraps(original)(make(original))
    replace(module_name, attribute, wrapped)
    for module in list(sys.modules.values()):
        namespace = getattr(module, "__dict__", {})
        if module is not sys.modules[module_name] and namespace.get(attribute) is original:
            namespace[attribute] = wrapped


def require_overridden(*classes: type) -> None:
    """Check that every method marked `typing.override` still overrides one of Megatron's. One that Megatron
    renamed would otherwise never be called again, and nobody would notice.

    Raises:
        ImportError: names the first method that overrides nothing.
    """
    for cls in classes:
        for name, member in vars(cls).items():
            if getattr(member, "__override__", False) and not hasattr(super(cls, cls), name):
                parent = cls.__mro__[1]
                raise ImportError(
                    f"{parent.__module__}.{parent.__qualname__}.{name} is not in megatron-core "
                    f"{megatron_version()}, and megatron_et's {cls.__name__} replaces it: versions that have "
                    f"it are {checked_versions()}"
                )


def replace(module_name: str, attribute: str, value: Any) -> None:
    """Replace one symbol in one place; `attribute` may be dotted."""
    find(module_name, attribute)
    owner_path, _, name = attribute.rpartition(".")
    owner = find(module_name, owner_path) if owner_path else importlib.import_module(module_name)
    setattr(owner, name, value)
    replaced.append(f"{module_name}.{attribute}")
