"""Memory that was freed and is still held."""

from __future__ import annotations

import contextlib
import ctypes


def give_back() -> None:
    """Give what the C library keeps of freed memory back to the system; nothing where it is not glibc.

    Large arrays that come and go raise the size from which glibc gives memory back by itself, and the runtime's arenas
    cut what is kept into pieces: hundreds of megabytes stay with the process from one stage to the next.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
