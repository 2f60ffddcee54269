"""Flight messages by hand, over grpcio: exact gRPC codes, frames that pyarrow would never send, streams held half-way.

A `Frame` is one FlightData. `encode` and `decode` are the few lines of protobuf that it needs.
"""

import queue
import struct
import threading
from dataclasses import dataclass

import grpc
import pyarrow as pa

FLIGHT = "/arrow.flight.protocol.FlightService/"
PATH, CMD = 1, 2


# -- protobuf ---------------------------------------------------------------------------------------------------------

def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def blob(number: int, value) -> bytes:
    """A length-delimited field."""
    return b"".join([varint(number << 3 | 2), varint(len(value)), value])


def integer(number: int, value: int) -> bytes:
    """A varint field."""
    return varint(number << 3) + varint(value)


def fields(data: bytes):
    """(number, value) of each field; varints as int, the rest as bytes."""
    at = 0

    def read():
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        tag = read()
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            yield number, read()
        else:
            size = {1: 8, 5: 4}[kind] if kind != 2 else read()
            yield number, data[at:at + size]
            at += size


# -- frames -----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Frame:
    """One FlightData message. `descriptor` is an encoded FlightDescriptor."""

    descriptor: bytes | None = None
    header: bytes | None = None
    metadata: bytes | None = None
    body: bytes | None = None

    def encode(self) -> bytes:
        parts = ((1, self.descriptor), (2, self.header), (3, self.metadata), (1000, self.body))
        return b"".join(blob(number, value) for number, value in parts if value is not None)


def decode(data: bytes) -> Frame:
    found = dict(fields(data))
    return Frame(found.get(1), found.get(2), found.get(3), found.get(1000))


def descriptor(cmd: bytes) -> bytes:
    """A FlightDescriptor of type CMD."""
    return integer(1, CMD) + blob(2, cmd)


def path_descriptor(*path: str) -> bytes:
    """A FlightDescriptor of type PATH."""
    return integer(1, PATH) + b"".join(blob(3, part.encode()) for part in path)


def opening(cmd: bytes) -> Frame:
    """What pyarrow sends first: a descriptor without a header."""
    return Frame(descriptor=descriptor(cmd))


def schema_frame(schema: pa.Schema, **rest) -> Frame:
    return _frame(schema.serialize(), **rest)


def batch_frame(batch: pa.RecordBatch, **rest) -> Frame:
    """A batch without dictionaries."""
    return _frame(batch.serialize(), **rest)


def compressed_frame(batch: pa.RecordBatch) -> Frame:
    """The batch with its body compressed, which pyarrow does when told to."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as writer:
        writer.write_batch(batch)
    messages = list(pa.ipc.MessageReader.open_stream(sink.getvalue()))
    return _frame(messages[1].serialize())


def _frame(serialized: pa.Buffer, **rest) -> Frame:
    message = pa.ipc.read_message(serialized)
    return Frame(header=message.metadata.to_pybytes(), body=message.body.to_pybytes() if message.body else b"", **rest)


def stream(cmd: bytes, batches, schema: pa.Schema | None = None):
    """The frames of a well-formed request, lazily."""
    yield opening(cmd)
    if schema is not None:
        yield schema_frame(schema)
    for batch in batches:
        if schema is None:
            schema = batch.schema
            yield schema_frame(schema)
        yield batch_frame(batch)


def to_batches(frames) -> tuple[pa.Schema | None, list[tuple[pa.RecordBatch, bytes | None]]]:
    """What a reply's frames hold: its schema, and batches with their app_metadata."""
    schema, found = None, []
    for frame in frames:
        if not frame.header:
            continue
        header = frame.header + b"\0" * (-len(frame.header) % 8)
        message = pa.ipc.read_message(struct.pack("<iI", -1, len(header)) + header + (frame.body or b""))
        if message.type == "schema":
            schema = pa.ipc.read_schema(message)
        else:
            found.append((pa.ipc.read_record_batch(message, schema), frame.metadata))
    return schema, found


# -- calls ------------------------------------------------------------------------------------------------------------

def channel(location: str) -> grpc.Channel:
    """A connection of its own: grpcio would share one between channels to the same address."""
    options = [
        ("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    if location.startswith("grpc+unix://"):
        target = "unix:" + location.removeprefix("grpc+unix://")
        options.append(("grpc.default_authority", "localhost"))
    else:
        target = location.removeprefix("grpc://").removeprefix("grpc+tcp://")
    return grpc.insecure_channel(target, options)


def raw_exchange(location: str, frames, *, timeout: float = 120) -> tuple[list[Frame], str, str]:
    """Sends `frames` (Frame or bytes) while reading; returns (reply frames, name of the gRPC code, status message)."""
    with Call(location, timeout=timeout) as call:
        sender = threading.Thread(target=call.send_all, args=(frames,), daemon=True)
        sender.start()
        replies, code, details = call.read_all()
        call.abandon()
        sender.join(timeout)
        return replies, code, details


class Call:
    """One open DoExchange, driven by hand. Leaving the context cancels it."""

    def __init__(self, location: str, *, timeout: float = 120, on: grpc.Channel | None = None):
        """On a connection of its own, or on one that is shared."""
        self._own = None if on else channel(location)
        self._channel = on or self._own
        # One frame at a time, so that a server that holds back holds `send` back.
        self._queue = queue.Queue(maxsize=1)
        self._over = threading.Event()
        self._call = self._channel.stream_stream(FLIGHT + "DoExchange")(self._requests(), timeout=timeout)
        self._call.add_callback(self._over.set)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.abandon()
        self._call.cancel()
        if self._own:
            self._own.close()

    def _requests(self):
        while (frame := self._take()) is not None:
            yield frame if isinstance(frame, bytes) else frame.encode()

    def _take(self):
        while not self._over.is_set():
            try:
                return self._queue.get(timeout=0.1)
            except queue.Empty:
                pass
        return None

    def send(self, frame: Frame | bytes | None) -> bool:
        """Hands over one frame, waiting while earlier ones are held back. False: the call is over."""
        while not self._over.is_set():
            try:
                self._queue.put(frame, timeout=0.1)
                return True
            except queue.Full:
                pass
        return False

    def done_writing(self) -> bool:
        return self.send(None)

    def send_all(self, frames):
        """Every frame, then the end of the request."""
        if all(self.send(frame) for frame in frames):
            self.done_writing()

    def abandon(self):
        """Nothing more will be sent."""
        self._over.set()

    def read(self) -> Frame | None:
        """The next reply frame; None when the call has ended, however it ended."""
        try:
            return decode(next(self._call))
        except StopIteration:
            return None
        except grpc.RpcError:
            return None

    def read_all(self) -> tuple[list[Frame], str, str]:
        replies = list(iter(self.read, None))
        return replies, *self.status()

    def status(self) -> tuple[str, str]:
        """(name of the gRPC code, status message); waits for the end of the call."""
        return self._call.code().name, self._call.details() or ""


def unary(location: str, method: str, request: bytes) -> tuple[bytes | None, str, str]:
    """One unary call of any service, by full method path: (reply, code, message)."""
    with channel(location) as open_channel:
        try:
            return open_channel.unary_unary(method)(request, timeout=30), "OK", ""
        except grpc.RpcError as error:
            return None, error.code().name, error.details()


def server_stream(location: str, method: str, request: bytes) -> tuple[list[bytes], str, str]:
    """One message answered by a stream: (replies, code, message)."""
    with channel(location) as open_channel:
        return _collected(open_channel.unary_stream(method)(request, timeout=30))


def stream_of_one(location: str, method: str, request: bytes) -> tuple[list[bytes], str, str]:
    """A stream of one message, answered by a stream: (replies, code, message)."""
    with channel(location) as open_channel:
        return _collected(open_channel.stream_stream(method)(iter([request]), timeout=30))


def _collected(call) -> tuple[list[bytes], str, str]:
    replies = []
    try:
        replies.extend(call)
    except grpc.RpcError:
        pass  # read from the call below
    return replies, call.code().name, call.details() or ""
