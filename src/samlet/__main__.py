"""`python -m samlet`, and so `torchrun ... -m samlet train my.yaml`."""

from samlet.cli import main

if __name__ == "__main__":
    main()
