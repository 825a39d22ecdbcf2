"""`python -m ptuning`: the command line."""

from ptuning import sys_path


def main() -> None:
    """The `ptuning` command. Nothing but this package is imported before the working folder is off the path."""
    sys_path.leave_working_folder()
    from ptuning.cli.app import main as command

    command()


if __name__ == "__main__":
    main()
