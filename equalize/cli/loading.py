"""What is being loaded, said on a terminal while there is nothing else to see; a start without garbage collection."""

import contextlib
import gc
import sys
import threading
from collections.abc import Iterator
from typing import TextIO

_PATIENCE = 0.3  # seconds in which nobody wonders
_SLOW = ("mmseg", "segmentation_models_pytorch", "transformers", "torch")  # what takes seconds, the last first


class Loading:
    """A line such as "loading transformers ..." on a terminal, until `stop`."""

    def __init__(self, stream: TextIO, *, shown: bool) -> None:
        self._stream = stream
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._show, daemon=True)
        if shown:
            self._thread.start()

    def _show(self) -> None:
        before, pause = "", _PATIENCE
        while not self._stopped.wait(pause):
            library = next((name for name in _SLOW if name in sys.modules), "libraries")
            line, pause = f"loading {library} ...", 0.1
            if line != before:
                self._write(line)
                before = line
        if before:
            self._write("")

    def _write(self, line: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # the terminal may be gone
            self._stream.write(f"\r\x1b[K{line}")
            self._stream.flush()

    def stop(self) -> None:
        """Removes the line, before anything else is printed."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """No garbage collection: for what ends in seconds. Over all that torch and transformers make, it takes a tenth."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
