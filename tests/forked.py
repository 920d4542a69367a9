"""What `tests/test_prefork.py` has forked: a process that says what it is, and then does as it is told."""

import os
import random
import signal
import sys
import time

from camri_tune.prefork import serve

IMPORTED_IN = os.getpid()


def work(arguments: list[str]) -> int:
    what, *_ = arguments
    facts = (
        IMPORTED_IN,
        os.getppid(),
        os.getpid(),
        os.getpgid(0),
        os.getcwd(),
        os.environ.get("MARK"),
        random.random(),
    )
    print(*facts, sep="\n", flush=True)
    print(sys.stdin.read(), end="", file=sys.stderr)
    if what == "modules":
        print(*sys.modules, flush=True)
        return 0
    if what == "fail":
        raise LookupError("nothing to be found")
    if what == "wait":
        time.sleep(600)
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    return int(what)


if __name__ == "__main__":
    sys.exit(serve(work))
