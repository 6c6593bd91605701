"""``python -m dsd_fast.cli``, the same as ``dsd-fast``."""

from dsd_fast.cli import main

main()
