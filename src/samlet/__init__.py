"""samlet: distil a Segment-Anything teacher into a MobileSAM that is good on your own images."""

__version__ = "0.1.0"
