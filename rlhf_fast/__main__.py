"""``python -m rlhf_fast``, which also serves ``torchrun -m rlhf_fast``."""

import sys

from rlhf_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
