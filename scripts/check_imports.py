"""Import every module of samlet with nothing but its core dependencies, as a user without extras would."""

from __future__ import annotations

import importlib
import pkgutil
import re
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions, requires
from types import ModuleType

import samlet


def core_distributions(name: str) -> set[str]:
    """A distribution and everything it needs without extras, by normalised name."""
    found: set[str] = set()
    waiting = [name]
    while waiting:
        current = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if current in found:
            continue
        try:
            distribution(current)
        except PackageNotFoundError:
            continue
        found.add(current)
        wanted = [line for line in requires(current) or () if "extra ==" not in line]
        waiting.extend(re.split(r"[\s\[<>=!~;(]", line)[0] for line in wanted)
    return found


class OnlyCore:
    """An import hook that hides whatever only an extra would install."""

    def __init__(self) -> None:
        core = core_distributions("samlet")
        owners = packages_distributions()
        self.hidden = {
            package
            for package, names in owners.items()
            if not core & {re.sub(r"[-_.]+", "-", name).lower() for name in names}
        }

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Refuse hidden packages; leave the rest to the ordinary finders."""
        if name.partition(".")[0] in self.hidden:
            raise ModuleNotFoundError(f"{name} is not a core dependency", name=name)
        return None


def main() -> None:
    """Import all; the first module that needs more ends the script."""
    sys.meta_path.insert(0, OnlyCore())
    names = [module.name for module in pkgutil.walk_packages(samlet.__path__, "samlet.")]
    for name in names:
        importlib.import_module(name)
    sys.stdout.write(f"{len(names)} modules import with the core dependencies alone\n")


if __name__ == "__main__":
    main()
