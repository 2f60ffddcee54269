"""Object stores on loopback: moto's S3, whatever stands before it, and a plain web server.

`Faulty` is a proxy that fails one request in ten, in turn by an error of the store, by hanging up, and by hanging up in the middle of an answer.
"""

import contextlib
import http.client
import itertools
import logging
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
from moto.server import ThreadedMotoServer

KEYS = {"AWS_ACCESS_KEY_ID": "someone", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}
BUCKET = "models"
# So many requests for one that fails.
FAILS_EVERY = 10


class S3:
    """moto's server, with one bucket."""

    def __init__(self):
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._server.start()
        self.address = self._server.get_host_and_port()
        self.endpoint = "http://{}:{}".format(*self.address)
        self._client = boto3.client("s3", endpoint_url=self.endpoint, region_name=KEYS["AWS_REGION"],
                                    aws_access_key_id="someone", aws_secret_access_key="secret")
        self._client.create_bucket(Bucket=BUCKET)

    def stop(self):
        self._server.stop()

    def environment(self, endpoint: str | None = None) -> dict[str, str]:
        return KEYS | {"AWS_ENDPOINT": endpoint or self.endpoint}

    def put(self, folder: Path, prefix: str) -> str:
        """Everything in a folder, as objects; the folder's URI."""
        for path in folder.rglob("*"):
            if path.is_file():
                self._client.put_object(Bucket=BUCKET, Key=f"{prefix}/{path.relative_to(folder)}", Body=path.read_bytes())
        return f"s3://{BUCKET}/{prefix}"

    def keys(self, prefix: str) -> list[str]:
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{prefix}/")
        return [found["Key"].removeprefix(f"{prefix}/") for page in pages for found in page.get("Contents", [])]

    def get(self, key: str) -> bytes:
        return self._client.get_object(Bucket=BUCKET, Key=key)["Body"].read()

    def mark(self, key: str):
        """An object without bytes, as a folder looks that a console has made."""
        self._client.put_object(Bucket=BUCKET, Key=key, Body=b"")

    def delete(self, key: str):
        self._client.delete_object(Bucket=BUCKET, Key=key)

    def fetch(self, prefix: str, folder: Path) -> Path:
        """All objects of a prefix, as files."""
        for key in self.keys(prefix):
            (folder / key).parent.mkdir(parents=True, exist_ok=True)
            (folder / key).write_bytes(self.get(f"{prefix}/{key}"))
        return folder

    def unfinished(self) -> list[str]:
        """Uploads that were begun and neither ended nor given up."""
        return [found["Key"] for found in self._client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])]


class Quiet(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self, status: int, headers: dict[str, str], data: bytes):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


class Faulty(Quiet):
    """Before another server: `behind` is its address, `count`, `seen` and `failed` what has come and was failed. Nothing is, if `fails_every` is 0."""

    behind: tuple[str, int]
    fails_every: int
    count: itertools.count
    seen: list[tuple[str, str]]
    failed: dict[str, int]

    def handle_one_request(self):
        # A client that is killed breaks off.
        with contextlib.suppress(ConnectionError):
            super().handle_one_request()

    def pass_on(self):
        body = self.body()
        number, every = next(self.count), self.fails_every
        self.seen.append((self.command, self.path.partition("?")[0]))
        fault = ("error", "silence", "half")[number // every % 3] if every and number % every == every - 1 else ""
        if fault == "error":
            self.failed[fault] += 1
            return self.answer(503, {"Content-Length": "0"}, b"")
        if fault == "silence":
            self.failed[fault] += 1
            return self.hang_up()
        connection = http.client.HTTPConnection(*self.behind, timeout=60)
        connection.request(self.command, self.path, body, dict(self.headers))
        found = connection.getresponse()
        data = found.read()
        connection.close()
        dropped = {"transfer-encoding", "connection", "content-length"}
        headers = {name: value for name, value in found.getheaders() if name.lower() not in dropped}
        # What HEAD says of a length is not that of its answer.
        length = found.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
        headers |= {"Content-Length": length} if length is not None else {}
        if fault == "half" and len(data) > 1 and self.command == "GET":
            self.failed[fault] += 1
            self.answer(found.status, headers, data[: len(data) // 2])
            return self.hang_up()
        return self.answer(found.status, headers, data)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = pass_on

    def hang_up(self):
        self.close_connection = True


class Web(Quiet):
    """A folder's files, whole and by ranges, and nothing listed. `moved` leads elsewhere."""

    folder: Path
    moved: dict[str, str]

    def do_GET(self):
        if target := self.moved.get(self.path):
            return self.answer(302, {"Location": target, "Content-Length": "0"}, b"")
        path = self.folder / self.path.lstrip("/")
        if not path.is_file():
            return self.answer(404, {"Content-Length": "0"}, b"")
        data, status, headers = path.read_bytes(), 200, {"Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT"}
        if wanted := self.headers.get("Range"):
            start, end = (int(part) for part in wanted.removeprefix("bytes=").split("-"))
            headers["Content-Range"] = f"bytes {start}-{min(end, len(data) - 1)}/{len(data)}"
            data, status = data[start : end + 1], 206
        return self.answer(status, headers | {"Content-Length": str(len(data))}, data)

    do_HEAD = do_GET


class Closed(Quiet):
    """Nobody may see anything."""

    def do_GET(self):
        self.answer(403, {"Content-Length": "0"}, b"")

    do_HEAD = do_GET


@contextlib.contextmanager
def serving(kind: type, **attributes):
    """A server of that kind on a free port; its class, with the attributes, and its URL."""
    handler = type(kind.__name__, (kind,), attributes)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield handler, "http://{}:{}".format(*server.server_address)
        finally:
            server.shutdown()


def faulty(s3: S3, fails_every: int = FAILS_EVERY):
    """A store that fails one request in ten, before another that does not."""
    failed = {"error": 0, "silence": 0, "half": 0}
    return serving(Faulty, behind=s3.address, fails_every=fails_every, count=itertools.count(), seen=[], failed=failed)


def web(folder: Path, moved: dict[str, str] | None = None):
    return serving(Web, folder=folder, moved=moved or {})
