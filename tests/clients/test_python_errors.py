"""One tree of errors: each reason of the contract has a class, and says what to do."""

import json
import pickle
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import flight

import quarrel
from harness import wire
from quarrel.errors import of_arrow
from quarrel.reasons import REASONS
from quarrel.stream import END

SPEC = Path(__file__).resolve().parents[2] / "proto/SPEC.md"
LINE = re.compile(r"^\| `([a-z0-9_]+)` \| (.+?) \| ([A-Z_]+|\(row\)) \| (.+?) \|$", re.M)
# Who must act, by the code that the contract gives a reason.
CLASSES = {
    "INVALID_ARGUMENT": quarrel.InvalidInputError, "FAILED_PRECONDITION": quarrel.InvalidInputError,
    "UNIMPLEMENTED": quarrel.UnsupportedError, "RESOURCE_EXHAUSTED": quarrel.BusyError,
    "UNAVAILABLE": quarrel.UnavailableError, "DEADLINE_EXCEEDED": quarrel.IdleError,
    "INTERNAL": quarrel.ServerError, "(row)": None, "PERMISSION_DENIED": quarrel.InvalidInputError,
    "NOT_FOUND": quarrel.InvalidInputError, "ALREADY_EXISTS": quarrel.InvalidInputError,
}
LAYER = np.ones((4, 64), np.float32)


def test_the_reasons_are_those_of_the_contract():
    section = SPEC.read_text(encoding="utf-8").partition("\n## Reasons\n")[2].partition("\n## ")[0]
    expected = {word: (meaning, CLASSES[code], advice) for word, meaning, code, advice in LINE.findall(section)}
    assert len(expected) == len(re.findall(r"^\| `", section, re.M)) > 50
    assert {word: (each.meaning, each.error, each.advice) for word, each in REASONS.items()} == expected
    assert list(REASONS) == list(expected)


@pytest.mark.parametrize("word", [word for word, reason in REASONS.items() if reason.error])
def test_a_reason_is_raised_as_its_class_with_its_advice(word):
    text = f"Flight returned some error, with message: [{word}] layer `a.b`: it is `so`. And so. " \
           f"gRPC client debug context: X:[{word}] layer `a.b`: it is `so`. Client context: OK"
    error = of_arrow(pa.ArrowInvalid(text))
    assert type(error) is REASONS[word].error
    assert (error.reason, error.layer, error.message) == (word, "a.b", "layer `a.b`: it is `so`. And so")
    assert error.advice == REASONS[word].advice and str(error) == f"{error.message}. {error.advice}"
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), copy.__dict__) == (type(error), str(error), error.__dict__)


def test_errors_are_what_python_calls_them_too():
    assert issubclass(quarrel.InvalidInputError, ValueError)
    assert issubclass(quarrel.UnavailableError, ConnectionError)
    assert issubclass(quarrel.IdleError, TimeoutError)
    kinds = [getattr(quarrel, name) for name in quarrel.__all__ if name.endswith("Error")]
    assert all(issubclass(kind, quarrel.Error) for kind in kinds)
    assert {kind for kind in kinds if kind.retryable} == {quarrel.BusyError, quarrel.UnavailableError}


def test_a_reason_of_a_later_server_is_no_riddle():
    error = of_arrow(flight.FlightInternalError("with message: [tired] the server is tired"))
    assert (type(error), error.reason, error.message) == (quarrel.ServerError, "tired", "the server is tired")


NAN = np.full((4, 64), np.nan, np.float32)
# What is asked, the class, the reason, the layer.
MISTAKES = [
    (dict(scheme="int99"), "scheme_unknown", None),
    (dict(profile="sky"), "profile_unknown", None),
    (dict(scheme="int8", profile="edge"), "command_malformed", None),
    (dict(), "command_malformed", None),
    (dict(scheme="int8", group_size=0), "option_invalid", None),
    (dict(scheme="W4A16"), "group_size_indivisible", "a"),
    (dict(recipe={"rules": []}), "recipe_invalid", None),
    (dict(recipe={"rules": [], "hue": 1}), "field_unknown", None),
]


@pytest.mark.parametrize("options, reason, layer", MISTAKES, ids=str)
def test_a_mistake_of_the_caller_is_an_invalid_input_error_with_the_servers_word(server, options, reason, layer):
    with quarrel.connect(server.location) as client, pytest.raises(quarrel.InvalidInputError) as caught:
        client.quantize({"a": LAYER}, **options).collect()
    assert (caught.value.reason, caught.value.layer) == (reason, layer)
    assert not caught.value.retryable and caught.value.advice in str(caught.value)


def test_bad_numbers_name_their_layer(server):
    with quarrel.connect(server.location) as client, pytest.raises(quarrel.InvalidInputError) as caught:
        client.quantize({"model.q`k": NAN}, scheme="int8").collect()
    assert (caught.value.reason, caught.value.layer) == ("non_finite", "model.q`k")


def test_a_full_server_is_a_busy_error(fresh_server):
    server = fresh_server("--streams-max", 1)
    with quarrel.connect(server.location) as client:
        first = client.quantize(((f"layer{number}", LAYER) for number in range(10**6)), scheme="int8")
        next(first)
        with pytest.raises(quarrel.BusyError, match="streams_max") as caught:
            list(client.quantize({"a": LAYER}, scheme="int8"))
        assert caught.value.retryable
        first.close()


def test_an_address_where_nobody_listens_is_an_unavailable_error(tmp_path):
    for address in ("127.0.0.1:1", "grpc://127.0.0.1:1", f"unix:{tmp_path}/none.sock"):
        with pytest.raises(quarrel.UnavailableError, match="Check that a server listens"):
            quarrel.connect(address)


@pytest.mark.parametrize("address", ["http://127.0.0.1:1", "ftp://x", "grpc://", ""])
def test_what_is_no_address_is_an_invalid_input_error(address):
    with pytest.raises((quarrel.InvalidInputError, quarrel.UnavailableError)):
        quarrel.connect(address, timeout=5)


def test_addresses_may_be_written_in_all_ways(fresh_server, tmp_path):
    network = fresh_server()
    local = fresh_server(listen=f"unix:{tmp_path}/q.sock")
    spellings = [network.location, network.location.removeprefix("grpc://"), local.location, f"unix:{tmp_path}/q.sock"]
    for spelling in spellings:
        with quarrel.connect(spelling) as client:
            assert len(client.quantize({"a": LAYER}, scheme="int8").collect()) == 1


class Other(flight.FlightServerBase):
    """A Flight server that is not ours; `contract`: what it says that it speaks."""

    def __init__(self, contract):
        super().__init__("grpc://127.0.0.1:0")
        self._contract = contract

    def do_action(self, context, action):
        if self._contract is None:
            raise NotImplementedError
        said = '{"version": "9", "contract": "%s", "cpu_level": "x", "threads": 1, "limits": [], "verbs": [], "new": 1}'
        return [flight.Result((said % self._contract).encode())]


@pytest.mark.parametrize("contract, advice", [(None, "Check that the address"), ("2.0", "of the server's version")])
def test_a_server_of_another_kind_or_contract_is_an_unsupported_error(contract, advice):
    with Other(contract) as other, pytest.raises(quarrel.UnsupportedError, match=advice):
        quarrel.connect(f"grpc://127.0.0.1:{other.port}")


def test_a_later_minor_version_of_the_contract_is_welcome():
    with Other("1.7") as other, quarrel.connect(f"grpc://127.0.0.1:{other.port}") as client:
        assert client.info().version == "9"


def test_a_scheme_of_a_later_server_still_has_its_bytes(server):
    from quarrel.codes import Layout

    with pytest.raises(quarrel.UnsupportedError, match="`mx4` is not known to this client"):
        Layout.of("mx4")
    assert wire.BINARY_DTYPES


class Short(Other):
    """Says that it is of our contract, and ends each stream well before its summary."""

    def __init__(self):
        super().__init__("1.1")

    def do_action(self, context, action):
        said = json.loads(super().do_action(context, action)[0].body.to_pybytes())
        limits = [{"name": "idle_seconds", "value": 60}, {"name": "message_bytes_max", "value": 1 << 26},
                  {"name": "batch_rows_max", "value": 1000}]
        return [flight.Result(json.dumps(said | {"limits": limits}).encode())]

    def do_exchange(self, context, descriptor, reader, writer):
        writer.begin(pa.schema([("layer_name", pa.string())]))
        # To the message that ends the input: a write that fails is another error.
        while (said := reader.read_chunk().app_metadata) is None or said.to_pybytes() != END:
            pass


def test_a_stream_that_ends_before_its_summary_is_no_end():
    with Short() as short, quarrel.connect(f"grpc://127.0.0.1:{short.port}") as client:
        with pytest.raises(quarrel.UnavailableError, match="before its summary"):
            client.quantize({"a": LAYER}, scheme="int8").collect()
