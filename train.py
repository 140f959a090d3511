"""`python train.py --config CONFIG [key=value ...]`: the same as `samlet train CONFIG [key=value ...]`."""

import argparse
import sys

from samlet.cli import main

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="YAML or JSON file")
    parser.add_argument("overrides", nargs="*", help="key.path=value, laid over the file")
    given = parser.parse_args()
    sys.argv = ["samlet", "train", given.config, *given.overrides]
    main()
