"""`python -m ptuning`: the command line."""

from ptuning import import_path


def main() -> None:
    """The `ptuning` command. Nothing but this package is imported before the working folder is off the path."""
    import_path.leave_working_folder()
    from ptuning.cli import main as command

    command()


if __name__ == "__main__":
    main()
