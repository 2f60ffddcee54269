"""Bad input, from the command line: one table, a row per thing that a person can get wrong.

Each row prints its exit code. Every message names the thing (layer, file, option), the value and what to do; nothing is
left in the folder, nothing that was there is changed, and nobody sees a panic.
"""

import contextlib
import json
import os
import resource
import signal
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import pyarrow.flight as flight
import pytest

from harness import cli, wire
from harness.command import quantize

BF16, F32 = ml_dtypes.bfloat16, np.float32
MIB = 1 << 20
COMMAND, INPUT, SERVER, SYSTEM = 2, 3, 4, 5


@dataclass(frozen=True)
class Case:
    """A row: what lies in the folder, the command line said in it, its exit code, and words of the message."""

    name: str
    code: int
    args: tuple
    says: tuple[str, ...]
    prepare: Callable[[Path], object]


def weights(*shape, dtype=F32, **at) -> np.ndarray:
    """Ordinary numbers; `at_7=value` puts one at flat index 7."""
    array = np.random.default_rng(7).standard_normal(shape).astype(dtype)
    for index, value in at.items():
        array.reshape(-1)[int(index.removeprefix("at_"))] = value
    return array


MODEL = {"mlp.up.weight": weights(16, 256), "mlp.norm.weight": np.ones(256, F32)}


def model(path: Path, tensors=None):
    cli.write(path / "in.safetensors", MODEL if tensors is None else tensors)


def bad_layer(name, array, reason, *says, flags=("-s", "int8"), layer="mlp.up.weight", code=INPUT) -> Case:
    """A good file but for one layer."""
    def prepare(folder):
        model(folder, {"a.weight": weights(4, 256), layer: array})
    named = f"`{layer}`" if len(layer) < 100 else layer[:40]
    return Case(name, code, ("quantize", "in.safetensors", "out.safetensors", *flags),
                (f"[{reason}]", named, *says), prepare)


def bad_file(name, content: bytes | Callable[[Path], object], *says, code=INPUT) -> Case:
    """SRC is not what it should be."""
    def prepare(folder):
        path = folder / "in.safetensors"
        path.write_bytes(content) if isinstance(content, bytes) else content(path)
    return Case(name, code, ("quantize", "in.safetensors", "out.safetensors", "-s", "int8"),
                ("`in.safetensors`", *says), prepare)


def bad_header(name, header, *says, data=b"\0" * 64, **options) -> Case:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return bad_file(name, lambda path: cli.write_raw(path, text, data, **options), *says)


def bad_command(name, *args, says=(), code=COMMAND, prepare=model) -> Case:
    return Case(name, code, ("quantize", "in.safetensors", "out.safetensors", *args), says, prepare)


def bad_recipe(name, text: str | bytes, *says, ending="yaml", code=COMMAND) -> Case:
    def prepare(folder):
        model(folder)
        (folder / f"recipe.{ending}").write_bytes(text if isinstance(text, bytes) else text.encode())
    return bad_command(name, "--recipe", f"recipe.{ending}", says=says, code=code, prepare=prepare)


def rule(**fields) -> str:
    return json.dumps({"rules": [{"targets": ["*"], **fields}]})


def entry(*shape, at=(0, 16), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(at)}


def truncated(path: Path):
    cli.write(path, MODEL)
    os.truncate(path, path.stat().st_size - 1)


def beside(make: Callable[[Path], object]):
    """A good file, and something else."""
    def prepare(folder):
        model(folder)
        make(folder)
    return prepare


NAN, INF = float("nan"), float("inf")
CASES = [
    # numbers
    bad_layer("NaN in f32", weights(16, 256, at_4095=NAN), "non_finite", "4095", "NaN"),
    bad_layer("infinity in bf16", weights(16, 256, dtype=BF16, at_0=INF), "non_finite", "index 0", "inf"),
    bad_layer("minus infinity in f16", weights(16, 256, dtype=np.float16, at_300=-INF), "non_finite", "300", "-inf"),
    bad_layer("f64 beyond f32", weights(16, 256, dtype=np.float64, at_7=1e300), "non_finite", "7"),
    bad_layer("NaN in the last run of a large layer", weights(2048, 1024, at_2097151=NAN), "non_finite", "2097151"),
    bad_layer("NaN under a ladder", weights(16, 256, at_9=NAN), "non_finite", "9", flags=("--profile", "edge")),
    # From -60000 to 60000 is more than f16 has, and from -3e38 to 3e38 more than f32.
    bad_layer("a scale beyond f16", np.tile(np.array([6e4, -6e4], np.float16), (2, 128)), "scale_overflow", "f16",
              flags=("-s", "int8-asym", "--arith", "weight-dtype")),
    bad_layer("a scale beyond f32", np.tile(np.array([3e38, -3e38], F32), (2, 128)), "scale_overflow", "f32",
              flags=("-s", "int8-asym")),

    # shapes and names
    bad_layer("a group that does not divide", weights(4, 100), "group_size_indivisible", "128", "100",
              flags=("-s", "W4A16", "--on-indivisible", "fail")),
    bad_layer("blocks in rank 3", weights(2, 4, 128), "rank_unsupported", "FP8_BLOCK", "[2, 4, 128]",
              flags=("-s", "FP8_BLOCK")),
    bad_layer("channel dims without columns", weights(4, 16, 16), "rank_unsupported", "channel_dims", "[4, 16, 16]",
              flags=("-s", "int8", "--channel-dims", 3, "--ignore", "a")),
    *(bad_recipe(f"a vector that a rule names, {scheme}", rule(targets=["mlp.norm.weight"], scheme=scheme),
                 "[rank_unsupported]", "`mlp.norm.weight`", "[256]", "two dimensions", code=INPUT)
      for scheme in ["nf4", "int4/g64", "int8", "W4A16", "fp8/tensor", "MXFP4A16", "int8_rowwise"]),
    Case("two tensors of one name", INPUT, ("quantize", "in.safetensors", "out.safetensors", "-s", "W4A16"),
         ("`mlp.up.weight_shape`", "twice"), lambda folder: model(folder, MODEL | {"mlp.up.weight_shape": np.ones(2)})),

    # files
    bad_file("an empty file", b"", "0 bytes"),
    bad_file("seven bytes", b"\1\0\0\0\0\0\0", "7 bytes"),
    bad_file("garbage", bytes(range(256)) * 16, "header", "4096"),
    bad_file("a pickle", b"\x80\x04\x95" + b"torch" * 100, "header"),
    bad_file("a file that is cut short", truncated, "bytes"),
    bad_file("a file with bytes at the end", lambda path: cli.write_raw(path, b"{}", b"more"), "bytes"),
    bad_file("a missing file", lambda path: None, "No such file", code=SYSTEM),
    bad_file("a folder", Path.mkdir, "folder"),
    bad_header("a header of 2^62 bytes", b"{}", str(1 << 62), claimed=1 << 62),
    bad_header("a header longer than the file", b"{}", "1000", claimed=1000),
    bad_header("a header of garbage", b"\xff" * 64),
    bad_header("a header that is cut", b'{"a.weight": {"dtype"'),
    bad_header("a header that is a list", [1, 2]),
    bad_header("a header of 100,000 brackets", b"[" * 100_000),
    bad_header("tensors that overlap", {"a.weight": entry(2, 2), "b.weight": entry(2, 2, at=(8, 24))}, "`b.weight`",
               data=b"\0" * 24),
    bad_header("tensors with a hole", {"a.weight": entry(2, 2), "b.weight": entry(2, 2, at=(32, 48))}, "`b.weight`",
               data=b"\0" * 48),
    bad_header("offsets that go back", {"a.weight": entry(2, 2, at=(16, 0))}, "`a.weight`", data=b"\0" * 16),
    bad_header("offsets below zero", {"a.weight": entry(2, 2, at=(-16, 0))}, "-16", data=b""),
    bad_header("a shape that lies", {"a.weight": entry(2, 3)}, "`a.weight`", data=b"\0" * 16),
    bad_header("a shape beyond all", {"a.weight": entry(2**40, 2**40)}, "`a.weight`", data=b"\0" * 16),
    bad_header("two tensors of one name in a header",
               b'{"a.weight":%s,"a.weight":%s}' % ((json.dumps(entry(2, 2)).encode(),) * 2), "`a.weight`", "twice",
               data=b"\0" * 16),
    bad_header("a type that is none", {"a.weight": entry(2, 2, dtype="Q4")}, "`Q4`", data=b"\0" * 16),
    bad_header("metadata of numbers", {"__metadata__": {"a": 1}, "a.weight": entry(2, 2)}, data=b"\0" * 16),

    # where to
    bad_command("SRC is DST", "-s", "int8", "--force", says=("`in.safetensors`",),
                prepare=beside(lambda folder: (folder / "out.safetensors").symlink_to("in.safetensors"))),
    bad_command("SRC is DST by a hard link", "-s", "int8", says=("`out.safetensors`", "exists"),
                prepare=beside(lambda folder: os.link(folder / "in.safetensors", folder / "out.safetensors"))),
    Case("SRC is DST by name", COMMAND, ("quantize", "in.safetensors", "./in.safetensors", "-f", "-s", "int8"),
         ("in.safetensors`",), model),
    bad_command("DST exists", "-s", "int8", says=("`out.safetensors`", "exists", "--force"),
                prepare=beside(lambda folder: (folder / "out.safetensors").write_text("mine"))),
    bad_command("the report exists", "-s", "int8", says=("`out.report.json`", "exists", "--force"),
                prepare=beside(lambda folder: (folder / "out.report.json").write_text("mine"))),
    bad_command("the report is SRC", "-s", "int8", "-f", "--report", "in.safetensors", says=("`in.safetensors`",)),
    bad_command("the report is DST", "-s", "int8", "-f", "--report", "out.safetensors", says=("`out.safetensors`",)),
    bad_command("the report is the recipe", "--recipe", "recipe.yaml", "-f", "--report", "recipe.yaml",
                says=("`recipe.yaml`",),
                prepare=beside(lambda folder: (folder / "recipe.yaml").write_text(rule(scheme="int8")))),
    bad_command("DST is a folder", "-s", "int8", "--force", says=("`out.safetensors`", "folder"),
                prepare=beside(lambda folder: (folder / "out.safetensors").mkdir())),
    # As `-f /dev/null` would be.
    bad_command("DST is a device or a pipe", "-s", "int8", "--force", says=("`out.safetensors`", "file"),
                prepare=beside(lambda folder: os.mkfifo(folder / "out.safetensors"))),
    bad_command("the report is a device or a pipe", "-s", "int8", "--force", says=("`out.report.json`", "file"),
                prepare=beside(lambda folder: os.mkfifo(folder / "out.report.json"))),
    Case("DST in a folder that is not there", SYSTEM, ("quantize", "in.safetensors", "no/out", "-s", "int8"),
         ("`no/out`", "No such file"), model),
    Case("DST in a folder that cannot be written to", SYSTEM, ("quantize", "in.safetensors", "/proc/o", "-s", "int8"),
         ("`/proc/o`",), model),
    bad_command("the report in a folder that is not there", "-s", "int8", "--report", "no/r.json",
                says=("no/r.json`", "No such file"), code=SYSTEM),

    # the command
    bad_command("an unknown scheme", "-s", "W4A17", says=("[scheme_unknown]", "`W4A17`", "W4A16")),
    bad_command("an unknown profile", "--profile", "moon", says=("[profile_unknown]", "`moon`", "`edge`")),
    bad_command("FP8, which needs calibration", "-s", "FP8", says=("[needs_calibration]", "`FP8`", "FP8_DYNAMIC")),
    bad_command("a group size that has no place", "-s", "W8A8", "--group-size", 32,
                says=("[option_conflict]", "`group_size` 32", "`W8A8`")),
    bad_command("indivisible groups of a scheme without any", "-s", "W8A8", "--on-indivisible", "keep",
                says=("[option_conflict]", "`on_indivisible`", "`W8A8`")),
    bad_command("a bad regex to ignore", "-s", "int8", "--ignore", "re:(", says=("[recipe_invalid]", "`re:(`")),
    bad_command("a bad glob to ignore", "-s", "int8", "--ignore", "a[", says=("[recipe_invalid]", "`a[`")),
    bad_command("an unknown set to ignore", "-s", "int8", "--ignore", "@moon", says=("[recipe_invalid]", "`@moon`")),
    bad_command("an address that is none", "-s", "int8", "--server", "nowhere", says=("`nowhere`", "unix:PATH")),
    bad_command("an address of another protocol", "-s", "int8", "--server", "http://h:1", says=("`http://h:1`",)),

    # recipes
    bad_recipe("an unknown field in a rule", rule(scheme="int8", size=3), "`recipe.yaml`", "'size'"),
    bad_recipe("an unknown field beside the rules", '{"rules": [], "shceme": "int8"}', "`recipe.yaml`", "'shceme'"),
    bad_recipe("an empty recipe", "", "`recipe.yaml`", "empty"),
    bad_recipe("a recipe of comments", "# nothing\n", "`recipe.yaml`", "empty"),
    bad_recipe("a recipe without rules", "{}", "[recipe_invalid]", "rules"),
    bad_recipe("a recipe that is a list", "- a\n", "`recipe.yaml`"),
    bad_recipe("a recipe that is a word", "W4A16", "`recipe.yaml`"),
    bad_recipe("a recipe of a megabyte", "#" * (MIB + 1), "`recipe.yaml`", str(MIB)),
    bad_recipe("a recipe with tabs", "rules:\n\t- a\n", "`recipe.yaml`", "line 2"),
    bad_recipe("a recipe that says a thing twice", "rules: []\nrules: []\n", "`recipe.yaml`", "rules"),
    bad_recipe("a recipe that is no UTF-8", b"rules: [{targets: [\xe9], scheme: int8}]", "`recipe.yaml`", "UTF-8"),
    bad_recipe("a recipe that explodes", "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{new}: &{new} [{','.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi")), "`recipe.yaml`"),
    bad_recipe("a recipe of 100,000 brackets", "[" * 100_000, "`recipe.yaml`", "recursion"),
    bad_recipe("a key twice in JSON", '{"rules": [], "rules": []}', "`recipe.json`", "line 1", ending="json"),
    bad_recipe("a bad regex", rule(scheme="int8").replace("*", "re:["), "[recipe_invalid]", "`re:[`"),
    bad_recipe("a regex with look-around", rule(scheme="int8").replace("*", "re:(?!x)"), "[recipe_invalid]",
               "look-around"),
    bad_recipe("an unknown scheme in a rule", rule(scheme="int9"), "[scheme_unknown]", "`int9`"),
    bad_recipe("an unknown scheme in a ladder", rule(scheme="int4", fallback={"schemes": ["int9"], "sqnr_db_min": 1}),
               "[scheme_unknown]", "`int9`"),
    bad_recipe("a ladder without a threshold", rule(scheme="int4", fallback={"schemes": ["int8"]}), "sqnr_db_min"),
    bad_recipe("FP8 in a rule", rule(scheme="FP8"), "[needs_calibration]", "`FP8`"),
    bad_recipe("FP8 in a ladder", rule(scheme="int4", fallback={"schemes": ["FP8"], "sqnr_db_min": 1}),
               "[needs_calibration]", "`FP8`"),
    bad_command("a recipe that is a folder", "--recipe", ".", says=("`.`",), code=SYSTEM),
    bad_command("a recipe that is not there", "--recipe", "none.yaml", says=("`none.yaml`", "No such file"),
                code=SYSTEM),

    # other verbs
    Case("dequantize over DST", COMMAND, ("dequantize", "in.safetensors", "out"), ("`out`", "exists"),
         lambda folder: (
             cli.write(folder / "dense", MODEL),
             cli.quantize(folder / "dense", folder / "in.safetensors", "-s", "int8"),
             (folder / "out").write_text("mine"),
         )),
    Case("dequantize onto itself", COMMAND, ("dequantize", "in.safetensors", "in.safetensors", "-f"),
         ("`in.safetensors`",), model),
    Case("inspect of garbage", INPUT, ("inspect", "in"), ("`in`",),
         lambda folder: (folder / "in").write_bytes(b"x" * 99)),
    Case("inspect of nothing", SYSTEM, ("inspect", "in"), ("`in`", "No such file"), lambda folder: None),
]


def picture(folder: Path) -> dict:
    """Every file of a folder, hidden ones too, and what is in it."""
    return {
        str(path): (path.stat().st_ino, path.read_bytes() if path.is_file() else b"")
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_is_answered_with_what_to_do_and_leaves_everything_as_it_was(case, tmp_path, capsys):
    case.prepare(tmp_path)
    before = picture(tmp_path)
    ended = cli.run(*case.args, cwd=tmp_path)

    with capsys.disabled():
        print(f"\n{case.name:62} {ended.code}", end=" ")
    assert picture(tmp_path) == before
    cli.check_refusal(ended, case.code, *case.says)
    assert ended.out == ""


CONFLICTS = [
    ("no scheme", ()),
    ("two ways", ("-s", "int8", "--profile", "edge")),
    ("a way and a recipe", ("-s", "a", "--recipe", "b")),
    ("a recipe and a group size", ("--recipe", "r", "--group-size", 32)),
    ("a profile and channel dims", ("--profile", "edge", "--channel-dims", 2)),
    ("a profile and ignore", ("--profile", "edge", "--ignore", "x")),
    ("a recipe and no standard", ("--recipe", "r", "--no-standard")),
    ("a recipe and indivisible groups", ("--recipe", "r", "--on-indivisible", "keep")),
    ("streams without a server", ("-s", "int8", "--streams", 4)),
    ("threads of a server", ("-s", "int8", "--server", "h:1", "--threads", 2)),
    ("the CPU level of a server", ("-s", "int8", "--server", "h:1", "--cpu-level", "scalar")),
    ("quiet and JSON", ("-s", "int8", "--quiet", "--json")),
    ("quiet and verbose", ("-s", "int8", "--quiet", "--verbose")),
    ("no streams", ("-s", "int8", "--server", "h:1", "--streams", 0)), ("no threads", ("-s", "int8", "--threads", 0)),
    ("an unknown flag", ("-s", "int8", "--fast")), ("a group of none", ("-s", "int4", "--group-size", 0)),
    ("a group below zero", ("-s", "int4", "--group-size", "-1")),
    ("an unknown arith", ("-s", "int8", "--arith", "f64")),
    ("an unknown level", ("-s", "int8", "--cpu-level", "neon")),
    ("an unknown way to fail", ("-s", "int8", "--on-error", "x")),
    ("one file", None),
]


@pytest.mark.parametrize("flags", [row[1] for row in CONFLICTS], ids=[row[0] for row in CONFLICTS])
def test_a_command_line_that_cannot_be_shows_the_usage(flags, tmp_path):
    model(tmp_path)
    before = picture(tmp_path)
    args = ["in.safetensors", "-s", "int8"] if flags is None else ["in.safetensors", "out.safetensors", *flags]
    ended = cli.run("quantize", *args, cwd=tmp_path)

    assert ended.code == COMMAND and ended.out == "" and not cli.FAULT.search(ended.err)
    assert ended.err.startswith("error: ") and "--help" in ended.err
    assert picture(tmp_path) == before


@pytest.mark.parametrize("variable, value", [
    ("QUARREL_THREADS", "x"), ("QUARREL_MEMORY_BYTES_MAX", "5"), ("QUARREL_CPU_LEVEL", "neon"),
])
def test_a_bad_variable_of_the_environment_is_named(variable, value, tmp_path):
    model(tmp_path)
    environment = cli.environment(**{variable: value})
    ended = cli.run("quantize", "in.safetensors", "out", "-s", "int8", cwd=tmp_path, env=environment)

    cli.check_refusal(ended, COMMAND, value, "QUARREL_")
    # As a flag or as a limit; nobody gave a flag, so nobody is to be sent to its help.
    assert variable.removeprefix("QUARREL_").lower() in ended.err.lower().replace("-", "_")
    assert "--help" not in ended.err
    assert not (tmp_path / "out").exists()


# -- what the system refuses ------------------------------------------------------------------------------------------

def test_a_full_disk_is_the_systems_word_and_leaves_nothing(tmp_path):
    """A limit on the size of files, which writing meets as it meets a full disk."""
    model(tmp_path, {"a.weight": weights(512, 1024)})
    before = picture(tmp_path)
    for bytes_max in (100_000, 278_600):  # within the results (278 kB), and within the file
        ended = cli.run(
            "quantize", "in.safetensors", "out.safetensors", "-s", "W4A16", cwd=tmp_path,
            # So that SIGXFSZ, which Python ignores, stays ignored.
            restore_signals=False, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_max, bytes_max)),
        )
        cli.check_refusal(ended, SYSTEM, "File too large")
        assert picture(tmp_path) == before


@pytest.mark.parametrize(
    "args", [["schemes"], ["inspect", "in.safetensors"], ["completions", "bash"]], ids=lambda args: args[0],
)
def test_a_full_standard_output_is_the_systems_word(args, tmp_path):
    model(tmp_path)
    with open("/dev/full", "w") as full:
        cli.check_refusal(cli.run(*args, cwd=tmp_path, stdout=full), SYSTEM, "standard output", "No space left")


def test_a_pipe_is_no_checkpoint_and_nobody_waits_for_it(tmp_path):
    """Opening one waits for a writer, and Ctrl-C must not be lost meanwhile."""
    os.mkfifo(tmp_path / "in")
    with cli.Running("quantize", tmp_path / "in", tmp_path / "out", "-s", "int8") as running:
        running.within(20, "nobody waits for a pipe")
        cli.check_refusal(running.end(), INPUT, "in`", "file")


def test_an_endless_recipe_is_not_read_to_its_end(tmp_path):
    model(tmp_path)
    half = 1 << 30
    ended = cli.run("quantize", "in.safetensors", "out", "--recipe", "/dev/zero", cwd=tmp_path,
                    preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (2 * half, 2 * half)))
    cli.check_refusal(ended, COMMAND, "`/dev/zero`", str(MIB))


# -- servers ----------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def listener(answer: Callable[[socket.socket], object] | None):
    """The address of a socket that answers every connection so, or lies there and takes none."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        def serve():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    with connection:
                        answer(connection)
        if answer:
            threading.Thread(target=serve, daemon=True).start()
        yield "127.0.0.1:%d" % listening.getsockname()[1]
        listening.shutdown(socket.SHUT_RDWR)


def http(connection: socket.socket):
    connection.recv(4096)
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")


def chatter(connection: socket.socket):
    connection.sendall(b"220 mail.example ESMTP\r\n" * 10)
    connection.recv(4096)


@contextlib.contextmanager
def flight_server(**methods):
    """The address of a Flight server that is not ours."""
    with type("Other", (flight.FlightServerBase,), methods)("grpc://127.0.0.1:0") as running:
        yield f"127.0.0.1:{running.port}"


def other_contract(self, context, action):
    return [b'{"version": "9.0.0", "contract": "9.0", "cpu_level": "avx2"}']


ELSEWHERE = [
    ("nobody", lambda: contextlib.nullcontext("127.0.0.1:1"), ("refused",)),
    ("no socket file", lambda: contextlib.nullcontext("unix:/tmp/quarrel-is-not-here"), ("No such file",)),
    ("no such host", lambda: contextlib.nullcontext("host.invalid:8815"), ("lookup",)),
    ("one who closes", lambda: listener(lambda connection: None), ("connection",)),
    ("a web server", lambda: listener(http), ("Check the address",)),
    ("a mail server", lambda: listener(chatter), ("Check the address",)),
    ("another Flight server", flight_server, ("Quarrel",)),
    ("a server of another contract", lambda: flight_server(do_action=other_contract), ("9.0", "1.")),
]


@pytest.mark.parametrize("place, says", [row[1:] for row in ELSEWHERE], ids=[row[0] for row in ELSEWHERE])
@pytest.mark.parametrize("verb", ["quantize", "schemes"])
def test_a_server_that_is_none_is_told_from_a_bad_file(verb, place, says, tmp_path):
    model(tmp_path)
    before = picture(tmp_path)
    args = ["in.safetensors", "out.safetensors", "-s", "int8"] if verb == "quantize" else []
    with place() as address:
        ended = cli.run(verb, *args, "--server", address, cwd=tmp_path)

    cli.check_refusal(ended, SERVER, *says)
    assert picture(tmp_path) == before


def test_a_server_that_never_answers_is_given_up(tmp_path):
    """Within 10 seconds, says the client; here it need only be before anybody would call it hung."""
    model(tmp_path)
    with listener(None) as address:
        args = ["quantize", "in.safetensors", "out", "-s", "int8", "--server", address]
        with cli.Running(*args, cwd=tmp_path) as running:
            running.within(20, "a server that never answers is given up")
            cli.check_refusal(running.end(), SERVER, "connection")


def test_a_busy_server_is_no_bad_file(fresh_server, tmp_path):
    model(tmp_path)
    before = picture(tmp_path)
    running = fresh_server("--streams-max", 1)
    args = ["quantize", "in.safetensors", "out.safetensors", "-s", "int8", "--server", running.location]
    with wire.opened(running.location, quantize("int8")) as (writer, reader):
        batch = wire.layer_batch("x", weights(2, 4))
        writer.begin(batch.schema)
        writer.write_batch(batch)
        reader.read_chunk()  # it is open now
        cli.check_refusal(cli.run(*args, cwd=tmp_path), SERVER, "[streams_exceeded]", "later")
        assert picture(tmp_path) == before
        writer.done_writing()
    cli.done(*args, cwd=tmp_path)


def test_a_server_of_small_messages_is_sent_small_runs(fresh_server, tmp_path):
    """`server.info` says what it takes, so nobody need be told to cut anything."""
    model(tmp_path, {"a.weight": weights(1024, 1024), "b.weight": weights(300, 256)})
    running = fresh_server("--message-bytes-max", MIB, "--layer-bytes-max", 2 * MIB, "--memory-bytes-max", 16 * MIB)
    cli.done("quantize", "in.safetensors", "here", "-s", "W4A16", cwd=tmp_path)
    cli.done("quantize", "in.safetensors", "there", "-s", "W4A16", "--server", running.location, cwd=tmp_path)

    assert (tmp_path / "there").read_bytes() == (tmp_path / "here").read_bytes()


OVER_LIMITS = [
    ("channel_too_large", ("--message-bytes-max", MIB), weights(2, 1 << 19), "int8", str(MIB)),
    ("span_too_large", ("--layer-bytes-max", 2 * MIB), weights(2048, 1024), "int8/tensor", str(2 * MIB)),
    ("name_too_long", ("--name-bytes-max", 8), weights(2, 16), "int8", "8"),
]


@pytest.mark.parametrize("reason, flags, layer, scheme, limit", OVER_LIMITS, ids=[row[0] for row in OVER_LIMITS])
def test_a_layer_over_a_limit_of_the_server_is_named(reason, flags, layer, scheme, limit, fresh_server, tmp_path):
    model(tmp_path, {"mlp.up.weight": layer})
    before = picture(tmp_path)
    running = fresh_server(*flags)
    ended = cli.run("quantize", "in.safetensors", "out", "-s", scheme, "--server", running.location, cwd=tmp_path)

    cli.check_refusal(ended, INPUT, f"[{reason}]", "`mlp.up.weight`", limit)
    assert picture(tmp_path) == before


def test_an_occupied_address_is_the_systems_word(server):
    address = server.location.removeprefix("grpc://")

    cli.check_refusal(cli.run("serve", "--listen", address), SYSTEM, address, "in use")


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_waiting_for_a_server_can_be_stopped(number, code, tmp_path):
    model(tmp_path)
    before = picture(tmp_path)
    with listener(None) as address:
        args = ["quantize", "in.safetensors", "out", "-s", "int8", "--server", address]
        with cli.Running(*args, cwd=tmp_path) as running:
            running.when(lambda: running.catches(number), "it minds signals")
            running.send(number)
            ended = running.end()

    assert ended.code == code and picture(tmp_path) == before
