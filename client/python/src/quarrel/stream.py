"""One exchange: a thread that sends, a thread that receives, and a bounded number of answers between them and us.

Answers are received whether or not anybody takes them, so that the server always gets rid of its own; nothing more is
sent while too many lie untaken. So a consumer may pause for minutes: nothing blocks, nothing grows, and the heartbeat
keeps the server from taking the pause for an absence.

Ctrl-C may strike the consumer between any two steps, and the collector may close a stream in any thread. So the
consumer holds no lock: it meets the other threads in `SimpleQueue`s, whole at every step, and in plain attributes.

Not here: what is sent (`runs`), what an answer means (`results`).
"""

from __future__ import annotations

import contextlib
import os
import threading
from dataclasses import dataclass
from queue import Empty, SimpleQueue

import pyarrow as pa
from pyarrow import flight

from quarrel.errors import UnavailableError, of_arrow
from quarrel.heart import Heart
from quarrel.runs import Source

UNTAKEN_BYTES_MAX = 4 << 20
"""While more lies untaken, nothing is sent: as much as one run. What is on its way by then comes on top."""
END = b'{"end": {}}'
"""The contract's message that ends the input."""
JOIN_SECONDS = 2.0
"""How long `close` waits for each thread; it then ends by itself: that of a caller's iterator when that returns. Not for ever, since the
collector may run `close` where `threading` holds the lock that threads need to end, as in `threading.enumerate`."""


@dataclass(frozen=True)
class Answer:
    """One message of the server: a batch, and the JSON of its progress or, without rows, of the summary."""

    batch: pa.RecordBatch
    report: bytes


_END = None
"""Stands in the queue of answers where the stream has ended or was closed."""


class Stream:
    """An exchange under way. `close` must be called; it may be called twice, and by any thread.

    `heartbeat`: after so many seconds, a sign of life goes out, again and again until everything is sent.
    """

    def __init__(self, connection: flight.FlightClient, command: bytes, source: Source, heartbeat: float) -> None:
        self._source = source
        self._answers: SimpleQueue[Answer | None] = SimpleQueue()
        self._schema: pa.Schema | None = None
        # Each counter has one thread that writes it.
        self._received_bytes = 0
        self._taken_bytes = 0
        self._ended = False
        self._closed = False
        # The sender says that it waits, looks once more, and waits; others change what it looks at, then wake it.
        self._sender_waits = False
        self._wake_sender: SimpleQueue[None] = SimpleQueue()
        # Why the stream ended early, the first of these that is there: what we cancelled it for (the caller's iterable,
        # a batch that cannot be written), the server, our writing.
        self._our_error: BaseException | None = None
        self._end_error: BaseException | None = None
        self._write_error: BaseException | None = None
        self._producing = False
        self._owner = os.getpid()
        self._heart = Heart(heartbeat)
        self._writer_closed = False
        try:
            self._writer, self._reader = connection.do_exchange(flight.FlightDescriptor.for_command(command))
        except (pa.ArrowException, OSError) as error:
            raise of_arrow(error) from None
        self._sender = threading.Thread(target=self._send, name="quarrel-send", daemon=True)
        self._others = [
            threading.Thread(target=self._receive, name="quarrel-receive", daemon=True),
            self._heart.thread(self._writer),
        ]
        for thread in (*self._others, self._sender):  # the sender may wait for the receiver
            thread.start()

    @property
    def schema(self) -> pa.Schema:
        """The schema of the answers. Only after the first of them."""
        assert self._schema is not None
        return self._schema

    def take(self) -> Answer | None:
        """The next answer, None at the end of the stream.

        Raises:
            Error: the server's, or the caller's own exception from the iterable.
        """
        answer = self._answers.get()
        if answer is not _END and not self._closed:
            self._taken_bytes += answer.batch.nbytes
            self._wake()
            return answer
        self._answers.put(_END)  # for whoever asks again
        if self._closed:
            raise UnavailableError("the stream is closed", advice="Take answers before closing it.")
        error = self._our_error or self._end_error or self._write_error
        if error is not None:
            raise error
        return None

    @property
    def untaken_bytes(self) -> int:
        """Of answers that have come and lie here."""
        return self._received_bytes - self._taken_bytes

    def close(self) -> None:
        """Cancels what is under way, and waits for the threads, a while."""
        if os.getpid() != self._owner:
            return  # a forked child has none of the threads
        self._closed = True
        self._reader.cancel()
        self._wake()
        self._heart.stop()
        if threading.current_thread() in (self._sender, *self._others):
            return  # the collector may run this in one of them, wherever it stands: they end by themselves
        for thread in (*self._others, self._sender):
            thread.join(JOIN_SECONDS)
        with contextlib.suppress(Empty):
            while True:
                self._answers.get_nowait()
        self._answers.put(_END)
        # Once: a second time is a fault that gRPC ends the process for. A thread that is alive still uses it.
        if not self._writer_closed and not any(thread.is_alive() for thread in (*self._others, self._sender)):
            self._writer_closed = True
            with contextlib.suppress(pa.ArrowException, OSError):  # it could only repeat what the reader was told
                self._writer.close()

    def _wake(self) -> None:
        if self._sender_waits:
            self._wake_sender.put(None)

    # -- the sending thread -------------------------------------------------------------------------------------------

    def _send(self) -> None:
        batches = self._source.batches
        try:
            self._write_all()
        except (pa.ArrowException, OSError) as error:
            # Mostly the stream has ended, and the receiving thread is told why. If not, the server must not wait.
            self._write_error = of_arrow(error)
            self._others[0].join(JOIN_SECONDS)
            if not self._ended:
                self._our_error = self._write_error
                self._reader.cancel()
        finally:
            self._heart.stop()
            close = getattr(batches, "close", None)
            if close is not None:
                with contextlib.suppress(Exception):  # nobody is left to hear of it
                    close()

    def _write_all(self) -> None:
        with self._heart.writing:
            self._writer.begin(self._source.schema)
        while True:
            # In this order, so that `close` knows whether it waits for us or for the caller's code.
            self._producing = True
            if self._closed:
                self._producing = False
                return
            try:
                batch = next(self._source.batches, None)
            except BaseException as error:  # the caller's, for the caller
                self._our_error = error
                self._reader.cancel()
                return
            finally:
                self._producing = False
            if batch is None:
                break
            if not self._has_room():
                return
            with self._heart.writing:
                self._writer.write_batch(batch)
            del batch  # before the next one is made
        with self._heart.writing:
            self._heart.still = True
            # Not `done_writing`: where an error of the server reaches the other thread at that moment, both close the
            # request, and gRPC ends the process for it. The server takes this for the end as well.
            self._writer.write_metadata(END)

    def _has_room(self) -> bool:
        """Waits for it; False if nobody wants more."""
        self._sender_waits = True
        while not (self._ended or self._closed) and self.untaken_bytes > UNTAKEN_BYTES_MAX:
            self._wake_sender.get()
        self._sender_waits = False
        return not (self._ended or self._closed)

    # -- the receiving thread -----------------------------------------------------------------------------------------

    def _receive(self) -> None:
        try:
            self._schema = self._reader.schema
            while True:
                chunk = self._reader.read_chunk()
                self._put(Answer(chunk.data, bytes(chunk.app_metadata or b"{}")))
                del chunk
        except StopIteration:
            self._end(None)
        except (pa.ArrowException, OSError) as error:
            self._end(of_arrow(error))
        except BaseException as error:  # a fault of ours must not leave the consumer waiting
            self._end(error)

    def _put(self, answer: Answer) -> None:
        if not self._closed:
            self._received_bytes += answer.batch.nbytes
            self._answers.put(answer)

    def _end(self, error: BaseException | None) -> None:
        self._end_error = error
        self._ended = True
        self._wake()
        self._answers.put(_END)
