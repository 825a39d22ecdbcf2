"""Which folders this process and those that it starts import from: what is installed, not where a command is typed.

Python puts the working folder (`python -m`) or the script's folder in front of everything else, and Ray does the same in every
worker of a driver. A file there that is called as a module is, `datasets.py` or `queue.py`, would be run instead of it. What
this module imports itself may come from there, too: only `os` and `sys`, which every Python has loaded before it looks.
"""

import os
import sys

PACKAGE = os.path.dirname(os.path.abspath(__file__))

carried = False
"""This package was found in a folder that was taken off, a source checkout that is not installed. This process goes on with it,
as a package knows where its modules lie; others need to be given it."""
_left = False


def leave_working_folder() -> None:
    """Take off the import path what Python has put there unasked, here and for all processes that this one starts.

    What the user has named in PYTHONPATH stays; an empty entry of it, which Python takes for the working folder, does not.
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
    except FileNotFoundError:  # it was removed meanwhile
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
