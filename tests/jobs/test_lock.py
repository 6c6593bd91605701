import signal
import subprocess
import sys

import pytest

from dsd_fast.jobs import LockedError, locked

HOLD = """
import sys, time
from pathlib import Path
from dsd_fast.jobs import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_dead_process_holds_no_lock(tmp_path):
    folder = tmp_path / "new"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(LockedError, match="another process"), locked(folder):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with locked(folder):
        pass


def test_a_lock_ends_with_its_block(tmp_path):
    for _ in range(2):
        with pytest.raises(KeyError), locked(tmp_path):
            raise KeyError
