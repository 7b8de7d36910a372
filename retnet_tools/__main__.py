"""The program: `retnet-tools`, and `python -m retnet_tools`."""

from __future__ import annotations

import os
import signal


def main() -> None:
    """Run a command line; an interrupt ends it in silence from its first import on."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # Modules in C make an ImportError of an exception while they are imported; nothing is to be cleaned up yet.
        signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))
    from retnet_tools.cli.app import main as run

    run()


if __name__ == "__main__":
    main()
