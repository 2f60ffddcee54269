"""One tree of errors, named for who must act.

The server says `[reason] sentence`; `of_arrow` turns what pyarrow makes of that into one of these. What each
reason asks of the caller stands in `quarrel.reasons`.
"""

from __future__ import annotations

import re

import pyarrow as pa
from pyarrow import flight

# `Flight returned .. error, with message: [reason] sentence. gRPC client debug context: ..`
_STATUS = re.compile(r"(?:.*?with message: )?(?P<text>.*?)(?:\. (?:gRPC client debug|Client) context: .*)?", re.S)
_REASON = re.compile(r"\[(?P<reason>[a-z0-9_]+)\] (?P<message>.*)", re.S)
_LAYER = re.compile(r"layer `(?P<layer>.*?)`: ", re.S)


MESSAGE_BYTES_MAX = 2000
"""The contract's, for what we say ourselves too: a longer message loses its middle."""


def cut(text: str) -> str:
    """`text` as a message: no longer than one may be, and without what cannot be printed."""
    data = text.encode("utf-8", "backslashreplace")
    if len(data) > MESSAGE_BYTES_MAX:
        half = MESSAGE_BYTES_MAX // 2 - 2
        data = data[:half] + b"..." + data[-half:]
    return data.decode("utf-8", "ignore")  # what is left of characters that the cut went through


class Error(Exception):
    """Whatever this package raises on purpose.

    `message` says what happened and `advice` what to do; `str()` is both. `reason` is the contract's word for it
    (`quarrel.reasons.REASONS`), where there is one; `layer` the layer's name, where it is about one.

    >>> try:
    ...     client.quantize({"q_proj": np.zeros((4, 64), "f4")}, scheme="int99").collect()
    ... except quarrel.Error as error:
    ...     print(error.reason, type(error).__name__, error.retryable)
    scheme_unknown InvalidInputError False
    """

    retryable: bool = False
    """Whether the same call may succeed later."""

    def __init__(
        self, message: str, *, reason: str | None = None, layer: str | None = None, advice: str = ""
    ) -> None:
        message = cut(message)
        super().__init__(f"{message}. {advice}" if advice else message)
        self.message = message
        self.reason = reason
        self.layer = layer
        self.advice = advice


class InvalidInputError(Error, ValueError):
    """The caller must change the call: an option, a layer, an address."""


class UnsupportedError(Error):
    """This server does not do that."""


class BusyError(Error):
    """The server has no room now."""

    retryable = True


class UnavailableError(Error, ConnectionError):
    """There is no server, it is stopping, or the client is closed."""

    retryable = True


class IdleError(Error, TimeoutError):
    """Nothing moved on the stream for too long."""


class ServerError(Error):
    """A fault of the server."""


class StartError(Error):
    """The server could not be started as a child process."""


def of_arrow(error: BaseException) -> Error:
    """The error that pyarrow's exception stands for."""
    found = _STATUS.fullmatch(str(error))
    text = found["text"] if found else str(error)
    said = _REASON.fullmatch(text)
    if said is None:
        return _without_reason(error, text)
    return of_reason(said["reason"], said["message"])


def of_reason(word: str | None, message: str) -> Error:
    """The error that the server's word and sentence stand for."""
    from quarrel.reasons import REASONS  # which names the classes above

    layer = _LAYER.match(message)
    reason = REASONS.get(word or "")
    kind = reason.error if reason and reason.error else ServerError
    advice = reason.advice if reason else "See the contract of the server's version."
    return kind(message, reason=word, layer=layer["layer"] if layer else None, advice=advice)


def _without_reason(error: BaseException, text: str) -> Error:
    """Said by gRPC or by pyarrow itself, before or instead of the server."""
    match error:
        case flight.FlightUnavailableError():
            return UnavailableError(text, advice="Check that a server listens at this address.")
        case flight.FlightTimedOutError():
            return UnavailableError(text, advice="Check the address, or allow more time.")
        case flight.FlightUnauthenticatedError() | flight.FlightUnauthorizedError():
            return InvalidInputError(text, advice="Ask whoever runs what stands before the server.")
        case flight.FlightCancelledError():
            return UnavailableError(text, advice="Try again: the call was cancelled on its way.")
        case pa.ArrowNotImplementedError():
            return UnsupportedError(text, advice="Check that the address is a Quarrel server's.")
        case pa.ArrowInvalid() | pa.ArrowKeyError() | pa.ArrowTypeError():
            return InvalidInputError(text, advice="Change what the message names: pyarrow refused it.")
        case _:
            return ServerError(text, advice="See the server's log.")
