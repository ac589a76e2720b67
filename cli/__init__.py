"""What surrounds a run: its flags and their checks, the memory plan, the report; how it begins."""

import ctypes
import os
import signal
import sys


def begin() -> None:
    """What a program does first, for importing torch takes seconds: from here on Ctrl-C ends it
    without a traceback, and a rank whose torchrun is gone, even killed, gets SIGTERM."""
    for name in ("stdin", "stdout", "stderr"):  # where one is closed, a file would take its place
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # nohup ignores it
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        PR_SET_PDEATHSIG = 1  # see prctl(2)
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
