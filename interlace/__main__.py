"""The command line as `python -m interlace`."""

from interlace.cli import main

main()
