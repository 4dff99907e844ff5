"""Entry point of `onnx-lowrank` and `python -m onnx_lowrank`: light, so that Ctrl-C is caught from the start."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line; an interrupt while it is being imported ends as every other one does."""
    # Threads of numpy's and scipy's OpenBLAS wait for work in a loop, by default for 2²⁸ cycles after every product: a
    # run of the model that follows has one core less for so long. Read when they are imported.
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "18")
    try:
        from onnx_lowrank import cli
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr, flush=True)
        os._exit(130)  # nothing to clean up yet, and an import broken off may make a plain exit end by signal
    sys.exit(cli.run())


if __name__ == "__main__":
    main()
