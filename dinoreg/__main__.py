"""The command line: ``python -m dinoreg COMMAND`` (or ``dinoreg COMMAND`` once installed)."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from dinoreg import __version__
from dinoreg.commands import basis, check, evaluate, info, invert, jacobian, points, register, warp
from dinoreg.errors import DinoRegError
from dinoreg.signals import leave_at_signals
from dinoreg.threads import sleep_while_waiting

COMMANDS = (register, warp, points, jacobian, invert, check, evaluate, basis, info)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after the program's name; those of the process if None.

    Returns:
        The exit status: 0, or the ``exit_code`` of the error, whose message goes to stderr as one line.
    """
    sleep_while_waiting()
    parser = argparse.ArgumentParser(prog="dinoreg", description="Registration of 3D medical images with frozen DINOv2 features.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(commands)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        arguments.run(arguments)
    except DinoRegError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


def program() -> int:
    """The command ``dinoreg``, which may be ended by signals."""
    leave_at_signals()
    return main()


if __name__ == "__main__":
    sys.exit(program())
