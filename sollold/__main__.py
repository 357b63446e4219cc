"""What the command ``sollold`` and ``python -m sollold`` start.

Nothing is imported above: Ctrl-C while Python still reads modules ends a command as it does later.
"""


def main() -> int:
    """Run the command and return its exit status."""
    try:
        from sollold.cli.main import main as command

        return command()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
