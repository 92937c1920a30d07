"""What is said while libraries load, and how a command ends."""

import gc
import io
import subprocess
import sys
import threading

import pytest

from equalize.cli import loading
from equalize.cli.loading import Loading, without_collection


class Stream(io.StringIO):
    """Tells when something was written."""

    def __init__(self):
        super().__init__()
        self.written = threading.Event()

    def flush(self):
        self.written.set()


def test_the_line_goes_before_anything_else_is_printed(monkeypatch):
    monkeypatch.setattr(loading, "_PATIENCE", 0)
    monkeypatch.setattr(loading, "_SLOW", ("of nobody", "gc"))
    stream = Stream()
    line = Loading(stream, shown=True)
    assert stream.written.wait(10)
    line.stop()
    line.stop()
    assert stream.getvalue() == "\r\x1b[Kloading gc ...\r\x1b[K"


@pytest.mark.parametrize("shown", [False, True])
def test_what_is_quick_or_redirected_says_nothing(shown):
    stream = Stream()
    Loading(stream, shown=shown).stop()
    assert stream.getvalue() == ""


def test_collection_is_put_back():
    assert gc.isenabled()
    with without_collection():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(KeyError), without_collection():
        raise KeyError
    assert gc.isenabled()


END = """
import atexit, sys, threading
sys.modules["torch"] = sys
from equalize.cli.process import leave
class Slow:
    def __del__(self): print("taken apart")
kept = Slow()
kept.itself = kept
atexit.register(print, "handled")
if len(sys.argv) > 1: threading.Thread(target=lambda: (threading.main_thread().join(), print("worked"))).start()
sys.stdout.write("said ")
leave(3)
"""


@pytest.mark.parametrize(("arguments", "output"), [((), "said handled\n"), (("thread",), "said worked\nhandled\n")])
def test_a_process_ends_by_its_exit_handlers_alone_unless_a_thread_works(arguments, output):
    done = subprocess.run([sys.executable, "-c", END, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout.startswith(output)
    assert ("taken apart" in done.stdout) == bool(arguments)
