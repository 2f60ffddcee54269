"""A stored checkpoint as answers: a stream that only receives."""

from __future__ import annotations

import pyarrow as pa
from pyarrow import flight

from quarrel.errors import UnavailableError, of_arrow
from quarrel.stream import Answer


class Pulled:
    """What `results.Answers` takes answers from, as from a `stream.Stream`. They come as they are taken."""

    def __init__(self, connection: flight.FlightClient, ticket: bytes) -> None:
        self._closed = False
        try:
            self._reader = connection.do_get(flight.Ticket(ticket))
        except (pa.ArrowException, OSError) as error:
            raise of_arrow(error) from None

    @property
    def schema(self) -> pa.Schema:
        return self._reader.schema

    def take(self) -> Answer | None:
        try:
            chunk = self._reader.read_chunk()
        except StopIteration:
            return None
        except (pa.ArrowException, OSError) as error:
            if self._closed:
                raise UnavailableError("the stream is closed", advice="Take answers before closing it.") from None
            raise of_arrow(error) from None
        return Answer(chunk.data, bytes(chunk.app_metadata or b"{}"))

    def close(self) -> None:
        self._closed = True
        self._reader.cancel()
