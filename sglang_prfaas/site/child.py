"""Runs a command that dies with its launcher: `python -I -S child.py LAUNCHER_PID COMMAND ...`.

Asks the kernel for SIGKILL when the launcher's thread ends, then becomes the command. It imports nothing of the
package and takes a few milliseconds. Doing this between fork and exec in the launcher itself would run Python in the
forked child of a process with threads, which can deadlock.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Set the parent-death signal and exec. Exits 127 where the command cannot be run, 137 where the parent is gone."""
    parent = int(sys.argv[1])
    command = sys.argv[2:]
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            sys.exit(f"prctl(PR_SET_PDEATHSIG): {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent:
        sys.exit(137)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"cannot run {command[0]}: {error.strerror}", file=sys.stderr)
        sys.exit(127)


if __name__ == "__main__":
    main()
