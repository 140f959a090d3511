"""Fixtures for every room."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference weights and real images beside the repository; tests that need it skip without it."""
    place = Path(__file__).resolve().parents[2] / "shared"
    if not place.is_dir():
        pytest.skip(f"needs the reference data in {place}")
    return place
