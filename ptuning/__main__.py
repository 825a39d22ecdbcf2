"""`python -m ptuning`: the command line."""

from ptuning import sys_path


def main() -> None:
    """The `ptuning` command. Removes the working folder from the import path before it imports other packages."""
    sys_path.leave_working_folder()
    from ptuning.cli.app import main as command

    command()


if __name__ == "__main__":
    main()
