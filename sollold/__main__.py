"""Entry point of the command ``sollold`` and of ``python -m sollold``.

Nothing else is imported at module level, so that Ctrl-C during imports also exits with status 130.
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
