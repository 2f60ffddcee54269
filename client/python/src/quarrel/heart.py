"""Signs of life on a request on which nothing is written for a while, so that the server does not take a pause for an absence."""

from __future__ import annotations

import threading
from queue import Empty, SimpleQueue
from typing import Any

import pyarrow as pa


class Heart:
    """Beats from a thread of its own after each `seconds` without another write, until it is told to stop.

    `writing` is held by whoever writes; `still`, set under it, ends the beats at once.
    """

    def __init__(self, seconds: float) -> None:
        self.writing = threading.Lock()
        self.still = False
        self._seconds = seconds
        self._stop: SimpleQueue[None] = SimpleQueue()

    def thread(self, writer: Any) -> threading.Thread:
        """The thread that beats, to be started."""
        return threading.Thread(target=self._beat, args=(writer,), name="quarrel-beat", daemon=True)

    def stop(self) -> None:
        """Ends the thread; it is not waited for."""
        self._stop.put(None)

    def _beat(self, writer: Any) -> None:
        while True:
            try:
                return self._stop.get(timeout=self._seconds)
            except Empty:
                pass
            # Somebody who writes needs no heartbeat.
            if self.writing.acquire(blocking=False):
                try:
                    if not self.still:
                        writer.write_metadata(b"alive")
                except (pa.ArrowException, OSError):
                    return
                finally:
                    self.writing.release()
