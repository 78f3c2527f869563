"""First on the search path of some tests' runs: a process that is about to complete a certain file waits there.

A stage of the small run takes milliseconds between one file and the next. So that a test can kill it in the middle,
and always at the same point, the process says that it has come there and sleeps. The same for a certain heartbeat, at
which every rank waits, until the test removes what it has announced. Which beat that is, a file may say, so that a test
can choose another one for processes that are started by a job of its own. Everything else is as it always is.
"""

import os
import time

_replace, _pwrite = os.replace, os.pwrite
_paused = False


def _announce(path):
    with open(path + ".partial", "w") as stream:
        stream.write(str(os.getpid()))
    _replace(path + ".partial", path)


def _pause_before(source, target, **options):
    wanted = os.environ.get("TSPIN_TEST_PAUSE_AT")
    if wanted and str(target).endswith(wanted):
        _announce(os.environ["TSPIN_TEST_PAUSED"])
        time.sleep(3600)
    _replace(source, target, **options)


def _in_file(path):
    try:
        with open(path) as stream:
            return stream.read()
    except (OSError, TypeError):
        return None


def _pause_after_beat(descriptor, data, offset):
    global _paused
    written = _pwrite(descriptor, data, offset)
    wanted = os.environ.get("TSPIN_TEST_PAUSE_AT_BEAT") or _in_file(os.environ.get("TSPIN_TEST_BEAT_FILE"))
    if wanted and not _paused and wanted.encode() in data:
        _paused = True
        announcement = f"{os.environ['TSPIN_TEST_PAUSED']}.{os.getpid()}"
        _announce(announcement)
        while os.path.exists(announcement):
            time.sleep(0.02)
    return written


os.replace, os.pwrite = _pause_before, _pause_after_beat
