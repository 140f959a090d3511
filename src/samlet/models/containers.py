"""nn.ModuleList that keeps the type of what it holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar, cast

from torch import nn

M = TypeVar("M", bound=nn.Module)


def module_list(modules: Iterable[M]) -> Sequence[M]:
    """An nn.ModuleList, which type checkers take for a sequence of its members' type."""
    return cast(Sequence[M], nn.ModuleList(modules))
