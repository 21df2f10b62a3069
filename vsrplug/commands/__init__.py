"""The `vsrplug` command: one Hydra application a verb."""

from __future__ import annotations

import os
import sys
from importlib import import_module

from vsrplug.site import unknown_name

COMMANDS = {
    "train": "tune plug-ins on a backbone, evaluate, and save weights, figures and a picture",
    "evaluate": "measure a backbone, with or without plug-ins, under a named protocol",
    "upscale": "super-resolve a video file or a folder of frames",
    "masks": "make the object masks of clips once, for training to read",
    "motion": "list the clips of a set that move most",
    "merge": "write a backbone and what was tuned on it as one ordinary checkpoint",
    "report": "one table and a page of what the runs in a folder left",
    "describe": "print sites, plug-ins, what learns, and what it costs, before anything runs",
    "demo": "three to ten minutes: tune plug-ins on the embedded clips, compare, detach",
}

USAGE = "\n".join(
    [
        "vsrplug: plug-in modules for video super-resolution",
        "",
        "usage: vsrplug COMMAND [group=choice] [key=value] ...",
        "",
        *(f"  {name:<10}{line}" for name, line in COMMANDS.items()),
        "",
        "vsrplug COMMAND --help      groups, choices and defaults of a command",
        "vsrplug COMMAND --cfg job   the whole configuration it would run with",
        "vsrplug train -m plugins=seem,memory_bank seed=0,1,2     every combination, one after another",
        "vsrplug report runs/sweeps/NAME                          what came of them",
        "",
        "Data folders are looked for in paths.data, which defaults to the variable VSRPLUG_DATA.",
        "HYDRA_FULL_ERROR=1 shows the traceback of an error.",
    ]
)


def main() -> None:
    """Entry point of the console script: run the command that the first argument names."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return
    if arguments[0] == "--version":
        from vsrplug import __version__

        print(f"vsrplug {__version__}")
        return
    command = arguments[0]
    if command not in COMMANDS:
        sys.exit(f"vsrplug: {unknown_name('command', command, COMMANDS)} See vsrplug --help.")
    sys.argv = [sys.argv[0], *arguments[1:]]
    try:
        import_module(f"vsrplug.commands.{command}").main()
        sys.stdout.flush()
    except BrokenPipeError:  # of `vsrplug train --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush at its end
        sys.exit(1)
