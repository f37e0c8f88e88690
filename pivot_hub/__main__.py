"""`python -m pivot_hub` is the `pivot` command."""

from pivot_hub.cli import main

main()
