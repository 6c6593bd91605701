"""The command line: ``dsd-fast`` and its commands."""

import sys


def main() -> None:
    """Runs the command that the process's arguments name."""
    try:
        from dsd_fast.cli.terminal import checked_stdout

        with checked_stdout():
            from dsd_fast.cli.app import app

            app(prog_name="dsd-fast")
    except KeyboardInterrupt:
        # A command handles its own; this one came before there was a command.
        sys.exit(130)
