"""What a user did that samlet cannot work with; the command line prints it as one sentence and exits 2."""

from __future__ import annotations


class SamletError(Exception):
    """A mistake in what samlet was given; its text names the file, the field and the remedy."""


class ConfigError(SamletError):
    """One or several mistakes in a configuration, each a line `file:line: path: what is wrong (what was meant)`."""


class DataError(SamletError):
    """An image, a mask, an annotation or a data set that cannot be read or used."""


class CheckpointError(SamletError):
    """A weights file or checkpoint that is missing, damaged, foreign or does not fit the model."""
