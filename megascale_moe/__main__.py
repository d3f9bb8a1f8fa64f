"""`python -m megascale_moe`: the command line, for launchers that start modules (torchrun -m)."""

from megascale_moe.cli import main

raise SystemExit(main())
