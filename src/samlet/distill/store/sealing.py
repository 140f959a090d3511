"""JSON that vouches for itself: its last word is the sha256 of the rest, and there is one way to write it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from samlet.artefacts import write_text
from samlet.errors import DataError

SEAL = "sha256"


def sealed(value: Mapping[str, Any], indent: int | None = None) -> str:
    """One text for equal values, with the digest of the rest among its keys."""
    content = {key: part for key, part in value.items() if key != SEAL}
    digest = hashlib.sha256(_text(content, None).encode()).hexdigest()
    return _text({**content, SEAL: digest}, indent)


def unsealed(text: str) -> dict[str, Any]:
    """What `sealed` wrote.

    Raises:
        ValueError: it is not that, to the letter.
    """
    value = json.loads(text)
    if not isinstance(value, dict) or text not in (sealed(value), sealed(value, indent=2)):
        raise ValueError("it is not what was written")
    return value


def write_sealed(path: Path, value: Mapping[str, Any], indent: int | None = None) -> None:
    """Write a sealed file whole or not at all."""
    write_text(path, sealed(value, indent) + "\n")


def read_sealed(path: Path) -> dict[str, Any]:
    """What `write_sealed` wrote.

    Raises:
        DataError: it is not there, cannot be read, or is damaged.
    """
    try:
        text = path.read_bytes().decode()
        if not text.endswith("\n"):
            raise ValueError("it is cut off")
        return unsealed(text[:-1])
    except FileNotFoundError as error:
        raise DataError(f"{path}: missing") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: damaged: {error}") from error


def _text(value: Mapping[str, Any], indent: int | None) -> str:
    separators = (",", ":") if indent is None else None
    return json.dumps(value, indent=indent, separators=separators, sort_keys=True, allow_nan=False)
