"""What surrounds an exchange: what the service says of itself, where it listens, what it is told, how it ends."""

import json
import subprocess

import numpy as np
import pyarrow as pa
import pyarrow.flight as flight
import pytest

from harness import frames, oracle, wire
from harness.command import quantize
from harness.server import binary, eventually

W8 = quantize("int8")
COMMAND = wire.command_bytes(W8)
LIMITS = {
    "memory_bytes_max": 1 << 30, "message_bytes_max": 64 << 20, "layer_bytes_max": 512 << 20,
    "batch_rows_max": 1_000_000, "layers_max": 1_000_000, "name_bytes_max": 1024, "streams_max": 32,
    "connections_max": 64, "connection_streams_max": 32, "jobs_max": 4, "shard_bytes_max": 5 << 30,
    "header_seconds": 30, "stream_seconds": 86_400, "idle_seconds": 60, "stall_seconds": 30, "discard_seconds": 300, "drain_seconds": 30,
}
LAYER = np.linspace(-1, 1, 4 * 64, dtype=np.float32).reshape(4, 64)


def batch(name="layer"):
    return wire.layer_batch(name, LAYER)


def action(server, name: str) -> dict:
    with wire.connect(server.location) as client:
        result, = client.do_action(flight.Action(name, b""))
        return json.loads(result.body.to_pybytes())


def limits(server) -> dict[str, int]:
    return {limit["name"]: int(limit["value"]) for limit in action(server, "server.info")["limits"]}


def served(location) -> bool:
    return wire.exchange(location, W8, [batch()]).layer("layer").codes == oracle.integers(LAYER, 8).data


# -- what it says of itself -------------------------------------------------------------------------------------------

def test_the_actions_are_listed_with_what_they_do(server):
    with wire.connect(server.location) as client:
        found = {listed.type: listed.description for listed in client.list_actions()}
    jobs = {f"job.{verb}" for verb in ("submit", "status", "cancel", "list")}
    assert set(found) == {"server.info", "schemes.list"} | jobs
    assert all(found.values())


def test_server_info_tells_version_level_threads_and_limits(server):
    info = action(server, "server.info")
    metadata = wire.exchange(server.location, W8, [batch()]).schema_metadata
    assert info["version"]
    assert info["contract"] == metadata["quarrel.version"]
    assert info["cpu_level"] == metadata["quarrel.level"]
    assert info["threads"] >= 1
    assert {"quantize", "dequantize"} <= set(info["verbs"])
    assert limits(server) == LIMITS


def test_every_listed_scheme_is_served(server):
    schemes = {scheme["name"]: scheme for scheme in action(server, "schemes.list")["schemes"]}
    presets = {"W4A16", "W4A16_ASYM", "W8A16", "W8A8", "INT8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK"}
    assert presets | {f"int{bits}" for bits in range(2, 9)} <= set(schemes)
    layer = np.linspace(-1, 1, 128 * 256, dtype=np.float32).reshape(128, 256)
    for name, scheme in schemes.items():
        row, = wire.exchange(server.location, quantize(name), [wire.layer_batch("layer", layer)]).rows
        assert row["status"] == "quantized", name
        assert row["bit_width"] == scheme["bit_width"], name
        assert (row["zero_points"] is None) == scheme.get("symmetric", False), name


def test_the_schema_is_known_before_the_stream(server):
    descriptor = flight.FlightDescriptor.for_command(COMMAND)
    schema = wire.exchange(server.location, W8, [batch()]).schema
    with wire.connect(server.location) as client:
        assert client.get_schema(descriptor).schema.equals(schema, check_metadata=True)
        info = client.get_flight_info(descriptor)
    assert info.schema.equals(schema, check_metadata=True)
    assert (info.total_records, info.total_bytes) == (-1, -1)
    assert info.descriptor == descriptor


@pytest.mark.parametrize("method", ["GetSchema", "GetFlightInfo"])
def test_a_bad_command_is_refused_before_the_stream_too(server, method):
    sent = frames.descriptor(wire.command_bytes(quantize("int9")))
    _, code, message = frames.unary(server.location, frames.FLIGHT + method, sent)
    assert (code, wire.reason_of(message)) == ("INVALID_ARGUMENT", "scheme_unknown")


def health(server, service="") -> tuple[bytes | None, str]:
    sent = frames.blob(1, service.encode()) if service else b""
    reply, code, _ = frames.unary(server.location, "/grpc.health.v1.Health/Check", sent)
    return reply, code


def test_the_health_service_answers(server):
    assert health(server) == (frames.integer(1, 1), "OK")  # SERVING
    assert health(server, "arrow.flight.protocol.FlightService") == (frames.integer(1, 1), "OK")
    assert health(server, "no.such.Service")[1] == "NOT_FOUND"


TICKET, DESCRIPTOR, JOB = frames.blob(1, COMMAND), frames.descriptor(COMMAND), frames.blob(1, b"job.pause")
# method, what is sent, the verb that the message must name.
ELSEWHERE = [
    ("DoGet", frames.server_stream, TICKET, "DoExchange"),
    ("DoAction", frames.server_stream, JOB, "server.info"),
    ("ListFlights", frames.server_stream, b"", "DoExchange"),
    ("PollFlightInfo", frames.unary, DESCRIPTOR, "GetFlightInfo"),
    ("DoPut", frames.stream_of_one, frames.opening(COMMAND).encode(), "DoExchange"),
    ("Handshake", frames.stream_of_one, b"", "DoExchange"),
]


@pytest.mark.parametrize("method, call, sent, instead", ELSEWHERE, ids=[case[0] for case in ELSEWHERE])
def test_a_verb_that_is_not_served_names_the_one_to_use(server, method, call, sent, instead):
    _, code, message = call(server.location, frames.FLIGHT + method, sent)
    assert (code, wire.reason_of(message)) == ("UNIMPLEMENTED", "verb_unsupported")
    assert instead in message


# -- where it listens, and what it is told ----------------------------------------------------------------------------

def test_it_listens_on_a_unix_socket(fresh_server, tmp_path):
    path = tmp_path / "quarrel.sock"
    server = fresh_server(listen=f"unix:{path}")
    assert server.first_line == f"listening grpc+unix://{path}"
    assert served(server.location)
    server.end()
    assert not path.exists()


def test_a_flag_and_its_variable_mean_the_same(fresh_server):
    told = {name: value // 2 for name, value in LIMITS.items()}
    flags = [part for name, value in told.items() for part in ("--" + name.replace("_", "-"), value)]
    variables = {"QUARREL_" + name.upper(): str(value) for name, value in told.items()}
    assert limits(fresh_server(*flags)) == told
    assert limits(fresh_server(env=variables)) == told
    assert limits(fresh_server("--streams-max", 7, env=variables)) == {**told, "streams_max": 7}


def test_threads_and_level_are_told_too(fresh_server):
    for server in (
        fresh_server("--threads", 1, "--cpu-level", "scalar"),
        fresh_server(env={"QUARREL_THREADS": "1", "QUARREL_CPU_LEVEL": "scalar"}),
    ):
        info = action(server, "server.info")
        assert (info["threads"], info["cpu_level"]) == (1, "scalar")


def run(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([binary(), *arguments], capture_output=True, text=True, timeout=30)


def test_help_names_every_limit_and_its_variable():
    said = run("serve", "--help")
    assert said.returncode == 0
    for name in (*LIMITS, "listen", "threads", "cpu_level"):
        assert "--" + name.replace("_", "-") in said.stdout
        assert "QUARREL_" + name.upper() in said.stdout
    assert "serve" in run("--help").stdout


@pytest.mark.parametrize("arguments, says", [
    (["--streams-max", "many"], "many"), (["--cpu-level", "mmx"], "mmx"), (["--listen", "nowhere"], "nowhere"),
    (["--no-such-flag"], "no-such-flag"),
])
def test_a_bad_flag_is_refused_in_words(arguments, says):
    said = run("serve", *arguments)
    assert said.returncode != 0
    assert says in said.stderr and "panicked" not in said.stderr
    assert said.stdout == ""


# -- how it ends ------------------------------------------------------------------------------------------------------

def test_a_running_stream_finishes_while_the_server_drains(fresh_server):
    server = fresh_server("--drain-seconds", 60)
    with wire.opened(server.location, W8) as (writer, reader):
        writer.begin(batch().schema)
        writer.write_batch(batch("before"))
        reply = wire.Reply(reader.schema)
        reply.take(reader.read_chunk())
        server.terminate()
        eventually(lambda: refused(server.location), what="new streams are refused")
        writer.write_batch(batch("after"))
        writer.done_writing()
        while reply.summary is None:
            reply.take(reader.read_chunk())
    assert reply.layer("after").codes == oracle.integers(LAYER, 8).data
    assert server.wait(30) == 0


def refused(location) -> bool:
    _, code, _ = frames.raw_exchange(location, frames.stream(COMMAND, [batch()]), timeout=5)
    assert code in ("OK", "UNAVAILABLE")
    return code == "UNAVAILABLE"


def test_a_stream_that_outlives_the_drain_is_told_so(fresh_server):
    server = fresh_server("--drain-seconds", 1)
    with frames.Call(server.location) as call:
        for frame in frames.stream(COMMAND, [batch()]):
            call.send(frame)
        assert call.read().header and call.read().header  # schema and answer: the stream is running
        server.terminate()
        _, code, message = call.read_all()
    assert (code, wire.reason_of(message)) == ("UNAVAILABLE", "stopping")
    assert server.wait(30) == 0


def test_an_idle_server_stops_at_once(fresh_server):
    server = fresh_server("--drain-seconds", 60)
    with wire.connect(server.location) as client:
        list(client.list_actions())  # a connection that stays open holds nobody up
        assert server.stop(timeout=20) == 0


def test_one_connection_too_many_is_closed(fresh_server):
    server = fresh_server("--connections-max", 1)
    with wire.connect(server.location) as first:
        list(first.list_actions())
        assert frames.server_stream(server.location, frames.FLIGHT + "ListActions", b"")[1] == "UNAVAILABLE"
        list(first.list_actions())
    eventually(lambda: not refused(server.location), what="the place is free")


def test_a_cancelled_stream_frees_its_place(fresh_server):
    server = fresh_server("--streams-max", 1)
    with frames.Call(server.location) as call:
        for frame in frames.stream(COMMAND, [batch()]):
            call.send(frame)
        assert call.read().header
        with pytest.raises(pa.ArrowException, match="streams_exceeded"):
            served(server.location)
    eventually(lambda: place_is_free(server.location), what="the place is free")


def place_is_free(location) -> bool:
    try:
        return served(location)
    except pa.ArrowException as error:
        assert "streams_exceeded" in str(error)
        return False
