"""The import path of this process and its children: installed packages, not the folder in which a command is typed.

Python puts the working folder (`python -m`) or the script's folder first on the import path, and Ray does the same in every
worker of a driver. A file in it that has the name of a module, such as `datasets.py` or `queue.py`, would be imported instead
of the module. This module imports only `os` and `sys`: every Python has loaded them before it searches the path.
"""

import os
import sys

PACKAGE = os.path.dirname(os.path.abspath(__file__))

carried = False
"""True if this package was imported from the removed folder: a source checkout that is not installed. This process keeps
working, because a package remembers its own location; other processes must be given the folder."""
_left = False


def leave_working_folder() -> None:
    """Remove from the import path what Python adds by itself, in this process and in all its children.

    Entries of PYTHONPATH stay, except empty ones, which Python takes for the working folder.
    """
    global _left, carried
    if _left:
        return
    _left = True
    if not sys.flags.safe_path and sys.path and sys.path[0] == _script_folder():
        del sys.path[0]
    os.environ["PYTHONSAFEPATH"] = "1"
    _drop_empty_entries()
    own = os.path.realpath(os.path.dirname(PACKAGE))
    carried = own not in map(os.path.realpath, sys.path)


def _script_folder() -> str:
    main = sys.modules["__main__"]
    if main.__spec__ is not None:
        return _working_folder()  # python -m
    script = getattr(main, "__file__", None)
    return os.path.dirname(os.path.realpath(script)) if script else ""


def _working_folder() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:  # the folder was deleted
        return ""


def _drop_empty_entries() -> None:
    written = os.environ.get("PYTHONPATH")
    if not written:
        return
    named = [entry for entry in written.split(os.pathsep) if entry]
    if os.pathsep.join(named) == written:
        return
    here = _working_folder()
    if here in sys.path and here not in map(os.path.abspath, named):
        sys.path.remove(here)
    if named:
        os.environ["PYTHONPATH"] = os.pathsep.join(named)
    else:
        del os.environ["PYTHONPATH"]
