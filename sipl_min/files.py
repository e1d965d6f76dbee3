"""What all files that touch the disk need: one error class, whole writes, the place of the project's own assets."""

import contextlib
import os
from pathlib import Path

Name = str | os.PathLike  # of a file or folder


class InputError(ValueError):
    """Something handed in cannot be used. The message is one sentence: what is wrong, where, and what to do."""


def asset(name: str) -> Path:
    """Path of a file of the project's `data/` folder, in a checkout or in an installed package."""
    here = Path(__file__).parent
    for path in (here.parent / "data" / name, here / "assets" / name):
        if path.exists():
            return path
    raise InputError(f"the project's own file data/{name} is missing: install or clone sipl_min again")


@contextlib.contextmanager
def atomic_write(path: Name):
    """`with atomic_write(path) as temporary:` write to `temporary`; it takes the name `path` only once it is complete.

    Raises InputError where the place cannot be written; what was there before is then still there.
    """
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")  # same folder and ending, so renaming is atomic
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as e:
        raise InputError(f"cannot write {str(path)!r}: {e.strerror or e}") from e
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
