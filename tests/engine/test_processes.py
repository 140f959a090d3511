"""A run that loses one of its processes says so in one sentence; alone, errors are what they are."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from samlet.engine.processes import together
from samlet.errors import SamletError

BROKEN = "[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1234"


def group_of(count: int) -> SimpleNamespace:
    return SimpleNamespace(num_processes=count)


def test_a_lost_process_is_one_sentence() -> None:
    with pytest.raises(SamletError, match="another process of this run has ended"), together(group_of(2)):
        raise RuntimeError(BROKEN)


@pytest.mark.parametrize(("count", "message"), [(1, BROKEN), (2, "CUDA out of memory")])
def test_other_errors_pass(count: int, message: str) -> None:
    with pytest.raises(RuntimeError, match=message.split(maxsplit=1)[0].strip("[.")), together(group_of(count)):
        raise RuntimeError(message)
