"""Running a command of ``python -m rau`` in this process."""

from rau.__main__ import main


def status(arguments: list[str]) -> int:
    """The exit status, whether the command returns it or argparse ends the program."""
    try:
        return main(arguments)
    except SystemExit as ended:
        assert isinstance(ended.code, int)
        return ended.code
