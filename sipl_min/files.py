"""What every file that meets a person or the disk needs: one error class, whole writes, the project's own assets."""

import contextlib
import os
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

Name = str | os.PathLike  # of a file or folder


class InputError(ValueError):
    """Something handed in cannot be used. The message is one sentence: what is wrong, where, and what to do."""


def exit_code(command: Callable[[], int | None]) -> int:
    """Run a command. Errors of the input and Ctrl-C end in one sentence, not in a traceback: exit codes 2 and 130."""
    try:
        return command() or 0
    except (ValueError, FloatingPointError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as e:
        print(str(e) or "stopped", file=sys.stderr)
        return 130
    except (MemoryError, RuntimeError) as e:
        if not isinstance(e, MemoryError) and not any(text in str(e) for text in NO_MEMORY):
            raise
        why = (str(e) or "MemoryError").splitlines()[0]
        print(f"error: memory ran out ({why}): smaller photos, --tile or --batch-size help", file=sys.stderr)
        return 2


NO_MEMORY = ("out of memory", "can't allocate memory", "could not create a primitive", "ALLOC_FAILED")  # of PyTorch


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
    name = os.fsencode(path.name)
    short = path.name if len(name) < 240 else f"{zlib.crc32(name):08x}{path.suffix}"  # 255 bytes are allowed
    temporary = path.with_name(f".{os.getpid()}.{short}")  # same folder and ending, so renaming is atomic
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as e:
        raise InputError(f"cannot write {str(path)!r}: {e.strerror or e}") from e
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
