"""First on the search path of test_kill's runs: a process that is about to complete a certain file waits there.

A stage of the small run takes milliseconds between one file and the next. So that the test can kill it in the middle,
and always at the same point, the process says that it has come there and sleeps. Everything else is as it always is.
"""

import os
import time

_replace = os.replace


def _pause_before(source, target, **options):
    wanted = os.environ.get("TSPIN_TEST_PAUSE_AT")
    if wanted and str(target).endswith(wanted):
        announcement = os.environ["TSPIN_TEST_PAUSED"]
        with open(announcement + ".partial", "w") as stream:
            stream.write(str(os.getpid()))
        _replace(announcement + ".partial", announcement)
        time.sleep(3600)
    _replace(source, target, **options)


os.replace = _pause_before
