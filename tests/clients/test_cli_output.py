"""What the command line prints, and where: tables and JSON on standard output, progress and errors on the other."""

import json
import os
import pty
import re
import shutil
import subprocess
import termios

import numpy as np
import pyarrow.flight as flight
import pytest

from harness import cli, wire

VERBS = ("serve", "quantize", "estimate", "dequantize", "inspect", "schemes", "completions")
LAYERS = {f"model.layers.{index}.up_proj.weight": np.full((256, 256), 0.5 + index, np.float32) for index in range(12)}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    tensors = LAYERS | {"model.norm.weight": np.ones(8, np.float32)}
    return cli.write(tmp_path_factory.mktemp("output") / "model.safetensors", tensors)


@pytest.fixture(scope="module")
def quantized(source, tmp_path_factory):
    destination = tmp_path_factory.mktemp("quantized") / "model.safetensors"
    cli.quantize(source, destination, "-s", "W4A16")
    return destination


# -- tables and JSON --------------------------------------------------------------------------------------------------

def test_json_on_standard_output_is_the_report(source, tmp_path):
    ended = cli.quantize(source, tmp_path / "out.safetensors", "-s", "int8", "--json")

    assert ended.out == (tmp_path / "out.report.json").read_text()
    assert ended.err == ""


def test_json_says_what_was_dequantized(quantized, tmp_path):
    destination = tmp_path / "dense.safetensors"
    said = cli.done("dequantize", quantized, destination, "--json").json

    assert said["dequantized"] == dict.fromkeys(LAYERS, "W4A16")
    assert said["copied"] == 1 and said["server"] is None
    assert (said["source"], said["destination"]) == (str(quantized), str(destination))
    assert said["destination_bytes"] == destination.stat().st_size


def test_quiet_prints_nothing(source, quantized, tmp_path):
    for args in (["quantize", source, tmp_path / "a", "-s", "int8"], ["dequantize", quantized, tmp_path / "b"]):
        ended = cli.done(*args, "--quiet")
        assert (ended.out, ended.err) == ("", "")


def test_quiet_still_prints_errors(tmp_path):
    ended = cli.run("quantize", tmp_path / "none", tmp_path / "out", "-s", "int8", "--quiet")

    assert ended.code == 5 and ended.out == "" and "none" in ended.err


def test_the_table_ends_with_the_names_of_both_files(source, tmp_path):
    ended = cli.quantize(source, tmp_path / "out.safetensors", "-s", "int8")

    assert ended.out.splitlines()[-2:] == [str(tmp_path / "out.safetensors"), str(tmp_path / "out.report.json")]
    assert "12 quantized, 1 kept, 0 failed" in ended.out


def test_verbose_prints_a_line_for_every_layer(source, quantized, tmp_path):
    for args in (["quantize", source, tmp_path / "a", "-s", "int8"], ["dequantize", quantized, tmp_path / "b"]):
        lines = [line.split() for line in cli.done(*args, "--verbose").out.splitlines()]
        assert {name: sum(line[:1] == [name] for line in lines) for name in LAYERS} == dict.fromkeys(LAYERS, 1)


def test_a_reader_that_goes_away_is_no_fault(source, quantized):
    reading, writing = os.pipe()
    os.close(reading)
    for args in (["schemes"], ["inspect", quantized], ["completions", "bash"], ["--help"]):
        ended = cli.run(*args, stdout=writing)
        assert not cli.FAULT.search(ended.err), f"{args}:\n{ended.err}"
    os.close(writing)


# -- terminals --------------------------------------------------------------------------------------------------------

class Terminal:
    """A terminal for standard error, as long as it is open."""

    def __enter__(self):
        self._ours, self.theirs = pty.openpty()
        termios.tcsetwinsize(self._ours, (24, 100))
        return self

    def __exit__(self, *_):
        os.close(self._ours)

    def shown(self) -> str:
        """What came, to the end."""
        os.close(self.theirs)
        text = b""
        while True:
            try:
                more = os.read(self._ours, 65536)
            except OSError:  # so Linux tells that nobody writes any more
                more = b""
            if not more:
                return text.decode()
            text += more


def on_a_terminal(*args, **env) -> tuple[cli.Ended, str]:
    with Terminal() as terminal:
        ended = cli.run(*args, stderr=terminal.theirs, env=cli.environment(TERM="xterm-256color", **env))
        return ended, terminal.shown()


def test_progress_is_shown_on_a_terminal_and_only_there(source, tmp_path):
    ended, shown = on_a_terminal("quantize", source, tmp_path / "a.safetensors", "-s", "int8")
    elsewhere = cli.quantize(source, tmp_path / "b.safetensors", "-s", "int8")

    assert ended.code == 0
    assert re.search(r"of \d+\.\d+ MiB", shown), f"no progress in {shown!r}"
    assert cli.ESCAPE not in ended.out, "standard output is no terminal"
    assert elsewhere.err == ""


def test_quiet_shows_no_progress(source, tmp_path):
    ended, shown = on_a_terminal("quantize", source, tmp_path / "a.safetensors", "-s", "int8", "--quiet")

    assert (ended.code, ended.out, shown) == (0, "", "")


def test_errors_have_colours_on_a_terminal_and_only_there(tmp_path):
    args = ["quantize", tmp_path / "none", tmp_path / "out", "-s", "W4A17"]

    assert cli.ESCAPE in on_a_terminal(*args)[1]
    assert cli.ESCAPE not in on_a_terminal(*args, NO_COLOR="1")[1]
    assert cli.ESCAPE not in cli.run(*args).err


def test_names_in_a_file_cannot_steer_the_terminal(tmp_path):
    """A checkpoint is somebody else's: a name may hold escape codes, or a line that looks like ours."""
    name = "a\x1b[2J\x07b\n0 failed.weight"
    layer = np.ones((4, 128), np.float32)
    layer[0, 0] = np.nan
    source = cli.write(tmp_path / "in.safetensors", {name: layer})
    runs = [
        cli.run("inspect", source), cli.run("quantize", source, tmp_path / "a", "-s", "int8", "--verbose"),
        cli.run("quantize", source, tmp_path / "b", "-s", "int8", "--on-error", "continue"),
    ]

    for ended in runs:
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", ended.out + ended.err), ended
        assert "\n0 failed" not in ended.out + ended.err


# -- inspect ----------------------------------------------------------------------------------------------------------

def test_inspect_lists_every_tensor_and_the_scheme_of_quantized_layers(quantized):
    file = cli.read(quantized)
    said = cli.done("inspect", quantized, "--json").json

    assert said["metadata"] == file.metadata
    assert said["schemes"] == {name.removesuffix(".weight"): "W4A16" for name in LAYERS}
    assert said["bytes"] == sum(tensor.nbytes for tensor in file.tensors.values())
    assert {tensor["name"]: (tensor["dtype"], tensor["shape"], tensor["bytes"]) for tensor in said["tensors"]} == {
        name: (cli.NAMES[tensor.dtype], list(tensor.shape), tensor.nbytes) for name, tensor in file.tensors.items()
    }
    schemes = {tensor["name"]: tensor["scheme"] for tensor in said["tensors"]}
    assert schemes.pop("model.norm.weight") is None and set(schemes.values()) == {"W4A16"}

    lines = [line.split() for line in cli.done("inspect", quantized).out.splitlines()]
    for name, tensor in file.tensors.items():
        line, = [line for line in lines if line[:1] == [name]]
        assert cli.NAMES[tensor.dtype] in line and str(tensor.nbytes) in line
        assert " x ".join(map(str, tensor.shape)) in " ".join(line)


def test_inspect_of_a_dense_file_finds_no_quantized_layers(source):
    said = cli.done("inspect", source, "--json").json

    assert said["schemes"] == {} and {tensor["scheme"] for tensor in said["tensors"]} == {None}


def test_inspect_shows_a_file_of_another_layout_and_says_why_it_is_not_read(tmp_path):
    gptq = {"a.qweight": np.ones((16, 8), np.int32), "a.scales": np.ones((1, 8), np.float16)}
    source = cli.write(tmp_path / "gptq.safetensors", gptq)

    ended = cli.done("inspect", source)
    assert "a.qweight" in ended.out and re.search(r"Not read.*`a`.*`qweight`", ended.out)
    assert cli.done("inspect", source, "--json").json["schemes"] is None


# -- schemes ----------------------------------------------------------------------------------------------------------

def test_schemes_are_those_of_the_server(server):
    with wire.connect(server.location) as client:
        result, = client.do_action(flight.Action("schemes.list", b""))
    listed = json.loads(result.body.to_pybytes())

    assert cli.done("schemes", "--json").json == listed
    assert cli.done("schemes", "--json", "--server", server.location).json == listed
    table = [line.split() for line in cli.done("schemes").out.splitlines()]
    for scheme in listed["schemes"]:
        assert [line for line in table if line[:1] == [scheme["name"]]], scheme["name"]


# -- completions and help ---------------------------------------------------------------------------------------------

def flags_in(text: str) -> set[str]:
    return set(re.findall(r"(?<!\S)--[a-z][a-z-]*", text))


def flags_of(verb: str) -> set[str]:
    """The flags that its help lists, each at the beginning of a line."""
    shown = cli.done(verb, "--help").out
    return set(re.findall(r"^ +(?:-\w, )?(--[a-z][a-z-]*)", shown, re.M))


@pytest.fixture(scope="module")
def completed(tmp_path_factory):
    """`completed(*words)`: what bash offers after them."""
    script = tmp_path_factory.mktemp("bash") / "quarrel.bash"
    script.write_text(cli.done("completions", "bash").out)
    subprocess.run(["bash", "-n", script], check=True)

    def complete(*words: str) -> set[str]:
        ask = f"""source {script}; COMP_WORDS=({" ".join(words)} ''); COMP_CWORD={len(words)}
            _quarrel quarrel '' {words[-1]}; printf '%s\\n' "${{COMPREPLY[@]}}\""""
        return set(subprocess.run(["bash", "-c", ask], check=True, capture_output=True, text=True).stdout.split())

    return complete


def test_bash_completes_verbs_and_values(completed):
    assert completed("quarrel") >= set(VERBS)
    assert completed("quarrel", "quantize", "--on-error") == {"fail", "continue"}
    assert completed("quarrel", "dequantize", "--dtype") == {"f32", "bf16", "f16"}


@pytest.mark.parametrize("verb", VERBS)
def test_help_lists_every_flag_and_completions_offer_it(verb, completed):
    """Completions are made of what is parsed; help is what people read."""
    assert flags_in(" ".join(completed("quarrel", verb))) == flags_of(verb)


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_complete_verbs_and_flags(shell, tmp_path):
    script = cli.done("completions", shell).out
    words = set(re.findall(r"[\w-]+", script))

    assert words >= set(VERBS)
    assert {word.lstrip("-") for word in words} >= {"scheme", "recipe", "profile", "server", "on-indivisible", "json"}
    if shutil.which(shell):
        (tmp_path / "script").write_text(script)
        subprocess.run([shell, "-n", tmp_path / "script"], check=True)


@pytest.mark.parametrize("verb", ["", "quantize", "dequantize", "inspect", "schemes"])
def test_help_lists_the_exit_codes(verb):
    shown = cli.done(*verb.split(), "--help").out

    said = re.search(r"^Exit codes:\n((?: .*\n)+)", shown, re.M)
    assert said, "no exit codes"
    assert re.findall(r"\b\d+\b", said[1]) == ["0", "1", "2", "3", "4", "5", "6", "7", "129", "130", "143"]


def test_no_verb_is_an_error_that_shows_the_verbs():
    ended = cli.run()

    assert ended.code == 2 and ended.out == ""
    assert all(verb in ended.err for verb in VERBS)


def test_the_version_is_said():
    assert re.fullmatch(r"quarrel \d+\.\d+\.\d+\S*\n", cli.done("--version").out)
