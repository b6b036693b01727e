"""Process 1 of a container, as `tini` is in the image: passes signals on to its only child, reaps what others leave, ends with the child."""

import os
import signal
import sys


def main() -> int:
    child = os.fork()
    if child == 0:
        os.execv(sys.argv[1], sys.argv[1:])
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda got, _frame: os.kill(child, got))
    while True:
        pid, status = os.wait()
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
