"""What tests of stores share."""

from __future__ import annotations

import os

import pytest


@pytest.fixture
def unflushed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out waiting for the disk, which only a power cut would notice."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
