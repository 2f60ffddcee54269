"""`quarrel.connect()` without an address starts a server, which ends with its client however that ends."""

import glob
import os
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

import quarrel
from harness.server import binary, eventually
from quarrel import child

LAYER = np.ones((4, 64), np.float32)
MODEL = {"a": LAYER}


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def socket_of(client) -> Path:
    return Path(client.location.removeprefix("grpc+unix://"))


def test_a_client_without_an_address_has_a_server_of_its_own():
    with quarrel.connect(binary=binary(), flags=["--streams-max", 3]) as client:
        pid, socket = client._child.pid, socket_of(client)
        assert alive(pid) and socket.is_socket()
        assert client.info().limits["streams_max"] == 3
        [layer] = client.quantize(MODEL, scheme="int8")
        assert layer.dequantize().shape == LAYER.shape
    assert not alive(pid) and not socket.exists()
    with pytest.raises(quarrel.UnavailableError, match="closed"):
        layer.dequantize()


def test_only_this_user_may_open_the_socket():
    with quarrel.connect(binary=binary()) as client:
        assert stat.S_IMODE(socket_of(client).stat().st_mode) & 0o077 == 0


def test_a_client_that_is_dropped_takes_its_server_along():
    client = quarrel.connect(binary=binary())
    pid, socket = client._child.pid, socket_of(client)
    del client
    assert not alive(pid) and not socket.exists()


def test_a_closing_client_does_not_wait_for_its_streams():
    client = quarrel.connect(binary=binary())
    results = client.quantize(((f"layer{number}", LAYER) for number in range(10**6)), scheme="int8")
    next(results)
    pid = client._child.pid
    client.close()
    assert not alive(pid)


def test_a_temporary_folder_of_a_long_name_does_not_make_the_sockets_too_long(tmp_path, monkeypatch):
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with quarrel.connect(binary=binary()) as client:
        assert list(client.quantize(MODEL, scheme="int8"))


# -- finding and starting it ------------------------------------------------------------------------------------------

def test_the_program_on_path_is_found_before_the_checkouts(tmp_path, monkeypatch):
    program = tmp_path / "quarrel"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert child.find(None) == str(program)
    assert child.find("elsewhere") == "elsewhere"
    program.unlink()
    assert Path(child.find(None)).parts[-3:-1] in (("target", "release"), ("target", "debug"))


def test_a_program_that_is_nowhere_is_an_error_that_says_where_it_looked(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(child, "__file__", "/nowhere/client/python/src/quarrel/child.py")
    with pytest.raises(quarrel.StartError, match="`quarrel` on PATH.*cargo build.*binary="):
        quarrel.connect()
    with pytest.raises(quarrel.StartError, match="`/nowhere/quarrel`: No such file"):
        quarrel.connect(binary="/nowhere/quarrel")


def program(folder: Path, text: str) -> Path:
    path = folder / "quarrel"
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(0o755)
    return path


def test_a_server_that_does_not_start_says_why():
    with pytest.raises(quarrel.StartError, match="ended with code 2\n.*--threads"):
        quarrel.connect(binary=binary(), flags=["--threads", "many"])


def test_a_program_that_is_no_server_is_an_error_and_does_not_stay(tmp_path):
    path = program(tmp_path, "import os\nprint('hello', flush=True)\nos.read(0, 1)\n")
    with pytest.raises(quarrel.StartError, match="said `hello`, expected `listening"):
        quarrel.connect(binary=path)
    told = str(tmp_path / "pid")
    path = program(tmp_path, f"import os\nopen({told!r}, 'w').write(str(os.getpid()))\nos.read(0, 1)\n")
    with pytest.raises(quarrel.StartError, match="said nothing for"):
        quarrel.connect(binary=path, timeout=0.5)
    written = tmp_path / "pid"
    assert not written.exists() or not written.read_text() or not alive(int(written.read_text()))


def test_flags_beside_an_address_are_an_error(server):
    for options in ({"flags": ["--threads", "1"]}, {"binary": "quarrel"}):
        with pytest.raises(quarrel.InvalidInputError, match="beside `address`"):
            quarrel.connect(server.location, **options)


# -- the end of the interpreter ---------------------------------------------------------------------------------------

CONNECTED = """
import os, sys
import numpy as np
import quarrel

client = quarrel.connect(binary=sys.argv[1])
print(client._child.pid, client.location.removeprefix("grpc+unix://"), flush=True)
"""
ENDS = {
    "returns": "",
    "raises": "raise ValueError",
    "is told to exit": "sys.exit(3)",
    "exits without ado": "os._exit(0)",
    "is killed": "import signal; os.kill(os.getpid(), signal.SIGKILL)",
    "is terminated": "import signal; os.kill(os.getpid(), signal.SIGTERM)",
    "is interrupted": "import signal; os.kill(os.getpid(), signal.SIGINT); input()",
    "is killed in a stream": """
def layers():
    yield "a", np.ones((4, 64), np.float32)
    import signal
    os.kill(os.getpid(), signal.SIGKILL)
list(client.quantize(layers(), scheme="int8"))
""",
}


def run(code: str, **options) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.Popen([sys.executable, "-c", code, str(binary())], env=environment, text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, **options)


def test_flags_and_environment_come_before_our_own(monkeypatch):
    assert child._flags([]) == ["--log", "warn", "--drain-seconds", "1"]
    assert child._flags(["--log=info", "--drain-seconds", 9]) == ["--log=info", "--drain-seconds", "9"]
    monkeypatch.setenv("QUARREL_DRAIN_SECONDS", "7")
    assert child._flags([]) == ["--log", "warn"]
    with quarrel.connect(binary=binary()) as client:
        assert client.info().limits["drain_seconds"] == 7


@pytest.mark.parametrize("end", ENDS)
def test_no_server_outlives_an_interpreter_that(end):
    process = run(CONNECTED + ENDS[end])
    pid, socket = process.stdout.readline().split()
    process.wait(60)
    eventually(lambda: not alive(int(pid)), what=f"server {pid} ends")
    eventually(lambda: not os.path.exists(socket), what="its socket is gone")


def test_ctrl_c_in_the_terminal_is_for_python_alone():
    """The terminal sends SIGINT to the whole group: Python, which goes on here, and not the server."""
    code = CONNECTED + """
try:
    print("waiting", flush=True)
    sys.stdin.readline()
except KeyboardInterrupt:
    print(len(client.quantize({"a": np.ones((4, 64), np.float32)}, scheme="int8").collect()), flush=True)
"""
    process = run(code, start_new_session=True)
    process.stdout.readline()
    assert process.stdout.readline() == "waiting\n"
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert (out, process.returncode) == ("1\n", 0)


FORKED = CONNECTED + """
import warnings
warnings.simplefilter("ignore")
results = client.quantize({f"layer{number}": np.ones((512, 1024), np.float32) for number in range(50)}, scheme="int8")
next(results)
forked = os.fork()
if forked == 0:
    del results
    HERE
os.waitpid(forked, 0)
print(os.path.exists(client.location.removeprefix("grpc+unix://")), end=" ")
print(sum(1 for _ in results), len(client.quantize({"a": np.ones((4, 64), np.float32)}, scheme="int8").collect()))
"""


def test_a_forked_child_that_ends_leaves_the_server_to_its_parent():
    process = run(FORKED.replace("HERE", "client._child._stopped(); os._exit(0)"))
    process.stdout.readline()
    out, _ = process.communicate(timeout=60)
    assert (out, process.returncode) == ("True 49 1\n", 0)


def test_a_forked_child_that_lives_does_not_keep_the_server_of_a_parent_that_was_killed():
    process = run(FORKED.replace("HERE", "print('forked', os.getpid(), flush=True); sys.stdin.readline(); os._exit(0)"))
    pid, socket = process.stdout.readline().split()
    word, forked = process.stdout.readline().split()
    assert word == "forked" and alive(int(forked))
    process.kill()
    process.wait(60)
    eventually(lambda: not alive(int(pid)), what=f"server {pid} ends")
    assert alive(int(forked)) and not os.path.exists(socket)
    process.stdin.close()
    eventually(lambda: not alive(int(forked)))


def test_no_socket_of_ours_is_left():
    """The last of this file: whatever a test above left, each of its sockets has a server."""
    for socket in glob.glob(os.path.join(tempfile.gettempdir(), "quarrel-????????.sock")):
        assert any(socket.encode() in Path(path).read_bytes() for path in glob.glob("/proc/[0-9]*/cmdline")), socket
