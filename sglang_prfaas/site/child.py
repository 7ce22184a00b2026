"""Runs a command that dies with its launcher, and takes all that it started along: `child.py LAUNCHER_PID COMMAND ...`.

Asks the kernel for SIGKILL when the launcher's thread ends, then becomes the command. A guard stays behind in the
command's process group, and ends what is left of that once the command has ended, however it did. SGLang's processes
see to that themselves only once they have imported everything, and multiprocessing's resource tracker never does.

It imports nothing of the package and takes a few milliseconds. Doing this between fork and exec in the launcher itself
would run Python in the forked child of a process with threads, which can deadlock.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
_COMMAND_ENDED = signal.SIGUSR1


def main() -> None:
    """Set the parent-death signal and exec. Exits 127 where the command cannot be run, 137 where the parent is gone."""
    parent = int(sys.argv[1])
    command = sys.argv[2:]
    if sys.platform == "linux":
        _when_parent_ends(signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(137)
    if sys.platform == "linux" and os.getpgrp() == os.getpid():
        _leave_guard()
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"cannot run {command[0]}: {error.strerror}", file=sys.stderr)
        sys.exit(127)


def _when_parent_ends(number: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0) != 0:
        sys.exit(f"prctl(PR_SET_PDEATHSIG): {os.strerror(ctypes.get_errno())}")


def _leave_guard() -> None:
    """Fork the guard, and wait until it watches this process. One thread runs here, so forking is safe."""
    leader = os.getpid()
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.close(reading)
        _guard(leader, writing)
    os.close(writing)
    os.read(reading, 1)
    os.close(reading)


def _guard(leader: int, ready: int) -> None:
    """Wait for the end of the leader, whatever else is asked of this process, and end the group."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    _when_parent_ends(_COMMAND_ENDED)
    os.close(ready)
    while os.getppid() == leader:
        signal.sigwait({_COMMAND_ENDED})
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
