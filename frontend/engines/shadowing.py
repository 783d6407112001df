"""Finds foreign code that would be imported in place of one of our packages.

Our top-level names are short, so a folder `ipc/` beside a user's script can shadow ours, and a
regular package `kernels` always wins over our `kernels`, which is a namespace package.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from frontend.errors import EngineStartupError

PACKAGE_ROOT = Path(__file__).resolve().parents[2]
"""The directory that holds our packages."""
_PACKAGES = ("engine_core", "ipc", "kernels")


def check_packages_are_ours() -> None:
    """Raise EngineStartupError, naming the path, if foreign code stands in for ours."""
    for name in _PACKAGES:
        spec = importlib.util.find_spec(name)
        places: list[str] = []
        if spec is not None:
            places = list(spec.submodule_search_locations or [spec.origin or "an unknown place"])
        if str(PACKAGE_ROOT / name) not in places:
            found = places[0] if places else "nowhere"
            raise EngineStartupError(
                f"Caesura's package {name!r} lies in {PACKAGE_ROOT}, but Python finds {found}; "
                f"rename or uninstall what is there, or start from another directory"
            )
