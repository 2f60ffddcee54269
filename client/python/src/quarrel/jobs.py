"""`Job`: a checkpoint that a server makes of another, from URI to URI."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from quarrel import progress, report
from quarrel.errors import Error, InvalidInputError, UnavailableError, of_reason
from quarrel.progress import Asked, Progress
from quarrel.report import Summary

if TYPE_CHECKING:
    from typing_extensions import Self

POLL_SECONDS = 0.2
"""Between two questions of `wait`."""

Act = Callable[[str, Mapping[str, Any]], bytes]


class Job:
    """A job on a server, as it was when it was last asked. `Client.submit`, `job` and `jobs` give it.

    It runs whether or not anybody waits for it. Submitted again, here or elsewhere, it goes on from what is complete.
    """

    def __init__(self, act: Act, said: Mapping[str, Any]) -> None:
        self._act = act
        self._said = said

    def __repr__(self) -> str:
        return f"Job({self.name!r}, {self.state!r}, {self.source!r} -> {self.sink!r})"

    @property
    def name(self) -> str:
        """What the server calls it."""
        return str(self._said["job"])

    @property
    def state(self) -> str:
        """`running`, `done`, `failed` or `cancelled`."""
        return str(self._said["state"])

    @property
    def command(self) -> dict[str, Any]:
        """What it was asked for, with all that was left open, once it has looked at its source."""
        return dict(self._said.get("command", {}))

    @property
    def source(self) -> str:
        """The URI that it reads."""
        return str(self.command.get("source", ""))

    @property
    def sink(self) -> str:
        """The URI that it writes."""
        return str(self.command.get("sink", ""))

    @property
    def bytes_total(self) -> int:
        """Bytes of the source's layers that are quantized or dequantized."""
        return int(self._said.get("bytes_total", 0))

    @property
    def bytes_done(self) -> int:
        """Of these, those that are."""
        return int(self._said.get("bytes_done", 0))

    @property
    def layer(self) -> str | None:
        """The layer that is under way."""
        return self._said.get("layer")

    @property
    def seconds(self) -> float:
        """Since it was submitted, until its end."""
        return float(self._said.get("seconds", 0.0))

    @property
    def summary(self) -> Summary | None:
        """What was made: of a job that is done. `rows` are tensors of the source."""
        said = self._said.get("summary")
        return None if said is None else report.summary(json.dumps(said).encode())

    @property
    def error(self) -> Error | None:
        """Why it is not done: of a job that failed or was cancelled."""
        match self.state:
            case "failed":
                return of_reason(self._said.get("reason"), self._said.get("message", "the job failed"))
            case "cancelled":
                return UnavailableError(f"job `{self.name}` was cancelled", advice="Submit it again: it goes on.")
            case _:
                return None

    def refresh(self) -> Self:
        """Asks the server how it stands."""
        self._said = json.loads(self._act("job.status", {"job": self.name}))
        return self

    def cancel(self) -> Self:
        """Stops it, unless it is about to be complete. What is complete stays for the next time."""
        self._said = json.loads(self._act("job.cancel", {"job": self.name}))
        return self

    def wait(self, timeout: float | None = None, *, progress: Asked = None) -> Summary:
        """What was made, when it is done.

        Args:
            timeout: seconds after which we stop waiting; the job goes on.
            progress: as for `Client.quantize`.

        Raises:
            Error: why the job failed, of which `reason` is the server's word, or that it was cancelled.
            TimeoutError: it is not done in time.
        """
        if timeout is not None and not timeout >= 0:
            raise InvalidInputError(f"`timeout` is {timeout}: expected seconds", advice="Give none to wait for ever.")
        with _Shown(progress) as shown:
            end = None if timeout is None else time.monotonic() + timeout
            while self.state == "running":
                shown.show(self)
                left = POLL_SECONDS if end is None else min(POLL_SECONDS, end - time.monotonic())
                if left <= 0:
                    raise TimeoutError(f"job `{self.name}` is not done after {timeout} s: it goes on")
                time.sleep(left)
                self.refresh()
            shown.show(self)
        if self.error is not None:
            raise self.error
        assert self.summary is not None
        return self.summary


class _Shown:
    """What the option `progress` asks for, of a job: begun once it is known how much there is."""

    def __init__(self, asked: Asked) -> None:
        self._asked = progress.checked(asked)
        self._display: progress.Display | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._display is not None:
            self._display.close()

    def show(self, job: Job) -> None:
        if not job.bytes_total:
            return
        if self._display is None:
            self._display = progress.display(self._asked, job.bytes_total)
        if self._display is not None:
            made = job.summary
            layers = made.layers_quantized + made.layers_kept + made.layers_failed if made else 0
            out = made.bytes_out if made else 0
            self._display.show(Progress(layers, made.rows if made else 0, job.bytes_done, out, job.bytes_total, job.layer))
