# processes: child processes that never outlive the harness.
#
# Owns: every process the harness starts. Called by: guest, targets, the benchmark.
# Must not know: what the processes do.

"""Child processes that end with the harness, however it ends."""

import atexit
import ctypes
import os
import signal
import subprocess
import sys

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)
_children: list[subprocess.Popen] = []


def _die_with_parent() -> None:
    """Runs in the child: the kernel kills it when the harness is gone, even by SIGKILL."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def start(command: list[str], log: str, **options) -> subprocess.Popen:
    """Starts a process whose output goes to the file `log` (or where `options` says)."""
    with open(log, "ab") as sink:
        options.setdefault("stdout", sink)
        options.setdefault("stderr", sink)
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_die_with_parent, **options)
    _children.append(child)
    return child


def stop(child: subprocess.Popen, seconds: float = 10) -> int:
    """Asks a process to end, then makes it end. Returns its exit status as subprocess has it."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(seconds)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    if child in _children:
        _children.remove(child)
    return child.returncode


def kill(child: subprocess.Popen) -> None:
    """Ends a process at once."""
    if child.poll() is None:
        child.kill()
        child.wait()
    if child in _children:
        _children.remove(child)


def _stop_all() -> None:
    for child in list(_children):
        kill(child)


def _leave(signal_number: int, _frame) -> None:
    # As an exception, so that every `finally` on the way out still runs.
    sys.exit(128 + signal_number)


def clean_up_on_exit() -> None:
    """To be called once, by main: SIGTERM and SIGHUP end the harness as orderly as an exception does."""
    atexit.register(_stop_all)
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGHUP, _leave)


def tail(path: str, lines: int = 15) -> str:
    """The last lines of a log, for error messages."""
    try:
        with open(path, errors="replace") as file:
            found = file.read().replace("\r", "").splitlines()
    except OSError as error:
        return f"(no {os.path.basename(path)}: {error.strerror})"
    return "\n".join(found[-lines:]) or f"({os.path.basename(path)} is empty)"
