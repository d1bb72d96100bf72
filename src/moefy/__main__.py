"""`python -m moefy`."""

from moefy.cli import main

main()
