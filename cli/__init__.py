"""What surrounds a run: its flags and their checks, the memory plan, the report; how it begins."""

import ctypes
import errno
import importlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path


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


def tracker(
    name: str, out: Path, settings: dict, run_id: str, goes_on: bool
) -> tuple[Callable, Callable]:
    """(what shows {name: number} and a step, what ends it with an exit code) in wandb, in trackio,
    which is used alike, or in a directory that tensorboard reads. A run that `goes_on` does so
    there too, in wandb by its id, in trackio by its name. OSError if it cannot begin."""
    try:
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            to = SummaryWriter(out / name)
            return (lambda row, step: [to.add_scalar(k, x, step) for k, x in row.items()],
                    lambda code: to.close())  # fmt: skip
        module = importlib.import_module(name)
        known = {"id": run_id} if name == "wandb" else {}
        module.init(project="scalebio", name=out.name, config=settings,
                    resume="allow" if goes_on else "never", **known)  # fmt: skip
    except Exception as error:  # no account, no network: each raises what it likes
        raise OSError(errno.EIO, str(error) or repr(error), f"--report-to {name}") from None
    return module.log, lambda code: module.finish(*[code] * (name == "wandb"))
