"""`python -m gr`, the same as the console script `gr`."""

import sys

from gr.cli import main

sys.exit(main())
