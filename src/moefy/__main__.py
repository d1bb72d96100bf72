"""`python -m moefy`."""

from moefy_cli import main

if __name__ == "__main__":  # and not where a process is spawned
    main()
