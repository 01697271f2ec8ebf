"""Modules under the reference's names, and the import hook that makes them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from credit_parallel.dropin.names import MODULES, PACKAGES, ROOT


class Alias(ModuleType):
    """A module that has the names of another, private ones included, under a name of its own.

    What is set on it is set on the other too, so that a test which puts another ``get_domain_parallel_manager`` in its
    place changes what our functions call. Only what belongs to imports (its name, its path, its submodules) is its own.

    Args:
        name: Its name.
        source: The other module.
    """

    def __init__(self, name: str, source: ModuleType) -> None:
        super().__init__(name, source.__doc__)
        self.__dict__.update({key: value for key, value in vars(source).items() if not _is_dunder(key)})
        self.__dict__["__source__"] = source

    def __getattr__(self, name: str) -> Any:
        """What the other module has, or makes, when it is asked for."""
        source: ModuleType = self.__dict__["__source__"]
        if name == "__all__":
            return [each for each in getattr(source, "__all__", vars(source)) if not each.startswith("_")]
        try:
            if not _is_dunder(name):
                return getattr(source, name)
        except AttributeError:
            pass
        raise AttributeError(f"module {self.__name__!r}, which is {source.__name__}, has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        """Set on both, but for what is of this module alone."""
        super().__setattr__(name, value)
        if not self._is_own(name):
            setattr(self.__dict__["__source__"], name, value)

    def __delattr__(self, name: str) -> None:
        """Delete from both, but for what is of this module alone."""
        own = self._is_own(name)
        if own or name in self.__dict__:
            super().__delattr__(name)
        if not own:
            delattr(self.__dict__["__source__"], name)

    def __dir__(self) -> list[str]:
        return sorted({*self.__dict__, *dir(self.__dict__["__source__"])})

    def _is_own(self, name: str) -> bool:
        return _is_dunder(name) or f"{self.__name__}.{name}" in sys.modules


def _is_dunder(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


class DropInFinder(MetaPathFinder):
    """Finds the replaced modules, and ``credit`` where nobody else has it; leaves all other names to others."""

    def __init__(self) -> None:
        self._root: ModuleSpec | None = None

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of a module, or None; as :class:`importlib.abc.MetaPathFinder` has it."""
        if fullname == ROOT:
            found = self._elsewhere(fullname, path)
            if found is None:
                # As a namespace package without folders; importlib gives it its loader.
                found = self._root = ModuleSpec(fullname, None, origin="credit_parallel.dropin", is_package=True)
            return found
        if fullname not in MODULES:
            return None
        spec = ModuleSpec(fullname, _AliasLoader(), origin=MODULES[fullname], is_package=fullname in PACKAGES)
        if fullname in PACKAGES:
            # What else is in the folder that this package stands for is imported from there.
            found = self._elsewhere(fullname, path)
            spec.submodule_search_locations = list((found and found.submodule_search_locations) or [])
        return spec

    def provided(self, module: ModuleType) -> bool:
        """Whether a module ``credit`` is the one that this finder made."""
        return self._root is not None and module.__spec__ is self._root

    def _elsewhere(self, fullname: str, path: Sequence[str] | None) -> ModuleSpec | None:
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = None if find is None else find(fullname, path, None)
            if spec is not None:
                return spec
        return None


class _AliasLoader(Loader):
    """Makes an :class:`Alias`; with a package come all of its modules, as attributes too."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return Alias(spec.name, import_module(MODULES[spec.name]))

    def exec_module(self, module: ModuleType) -> None:
        for name in MODULES:
            if name.rpartition(".")[0] == module.__name__:
                import_module(name)
        for name, child in list(_others_in(module.__name__)):
            setattr(module, name, child)


def _others_in(package: str) -> Iterator[tuple[str, ModuleType]]:
    """Modules of a package that were imported before it was replaced."""
    for name, module in list(sys.modules.items()):
        parent, _, child = name.rpartition(".")
        if parent == package and name not in MODULES:
            yield child, module
