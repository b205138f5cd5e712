"""One command per file: a Config dataclass and main(config)."""

import os
import signal
import sys


def _end_at_once(*_: object) -> None:
    """What Ctrl-C does while a command is still being imported, which takes seconds with torch."""
    os.write(2, b"interrupted\n")
    os._exit(130)


# Only of the command itself: Python names it "-m" until it has found the module. A signal that the
# caller wants ignored stays ignored. `configurator.run` hands Ctrl-C over to the command.
if sys.argv[0] == "-m" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _end_at_once)
