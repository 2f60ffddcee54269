"""What the Python client costs over a bare pyarrow loop: peak memory and CPU time, on the same stream.

Both loops write layers made one by one, cut into runs of 4 MiB, from one thread, and drop each row as it is read. Each
runs in a fresh process, in interleaved rounds, against one server; ratios are of the same round. Memory is the peak
(VmHWM) over what the process held once it was connected. There is no timed assertion.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import flight

REPOSITORY = Path(__file__).resolve().parents[2]
ROWS = COLUMNS = 4096  # a layer of 64 MiB
RUN_ROWS = 256  # of 4 MiB
MIB = 1 << 20
SCHEMES = ("int8", "W4A16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=512, help="input of one loop, a multiple of 64")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--binary", type=Path, default=REPOSITORY / "target/release/quarrel")
    parser.add_argument("--results", type=Path, default=REPOSITORY / "tests/load/results", help="folder of the raw output")
    parser.add_argument("--loop", help=argparse.SUPPRESS)  # what a fresh process is told
    parser.add_argument("--address", help=argparse.SUPPRESS)
    parser.add_argument("--scheme", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.loop:
        print(json.dumps(LOOPS[options.loop](options.address, options.scheme, options.mib)))
        return
    # Modules of this folder, which lies on the path of a script.
    import machine
    from server import Server

    record = {"environment": machine.environment(REPOSITORY, options.binary), "load_before": machine.load_average()}
    with Server([str(options.binary), "serve", "--listen", "127.0.0.1:0", "--log", "warn"]) as server:
        found = {scheme: compare(server.address, scheme, options.mib, options.rounds) for scheme in SCHEMES}
    record |= {"load_after": machine.load_average(), "measured": {scheme: raw for scheme, (_, raw) in found.items()}}
    text = "\n".join(text for text, _ in found.values())
    print(text)
    write(options.results, record, text)


def write(folder: Path, record: dict, text: str) -> None:
    """What was printed and every measurement, as `results/DATE-COMMIT-python.{txt,json}`."""
    about = record["environment"]
    name = f"{about['date'][:19].replace(':', '')}Z-{about['commit'].split()[0]}-python"
    head = "\n".join(f"{key}: {value}" for key, value in about.items())
    (folder / f"{name}.txt").write_text(
        f"{__doc__}\n{head}\nload: {record['load_before']}, then {record['load_after']}\n\n{text}\n", encoding="utf-8"
    )
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"\n{folder / name}.txt")


def compare(address: str, scheme: str, mib: int, rounds: int) -> tuple[str, dict]:
    """A paragraph, and the measurements."""
    measured: dict[str, list[dict]] = {loop: [] for loop in LOOPS}
    for _ in range(rounds):
        for loop in LOOPS:
            arguments = ["--loop", loop, "--address", address, "--scheme", scheme, "--mib", str(mib)]
            done = subprocess.run([sys.executable, __file__, *arguments], check=True, stdout=subprocess.PIPE)
            measured[loop].append(json.loads(done.stdout))
    lines = [f"{scheme}, {mib} MiB of f32 in {rounds} interleaved rounds: median (all)"]
    for loop, found in measured.items():
        lines.append(f"  {loop:7} " + ", ".join(spread(found, key) for key in ("cpu_seconds", "seconds", "peak_mib")))
    pairs = list(zip(measured["bare"], measured["client"], strict=True))
    cpu = [client["cpu_seconds"] / bare["cpu_seconds"] for bare, client in pairs]
    memory = [client["peak_mib"] - bare["peak_mib"] for bare, client in pairs]
    lines.append(f"  client over bare: CPU x{statistics.median(cpu):.3f} ({', '.join(f'{x:.3f}' for x in cpu)}), "
                 f"peak {statistics.median(memory):+.1f} MiB ({', '.join(f'{x:+.1f}' for x in memory)})")
    return "\n".join(lines), measured


def spread(found: list[dict], key: str) -> str:
    values = [each[key] for each in found]
    return f"{key} {statistics.median(values):.2f} ({', '.join(f'{value:.2f}' for value in values)})"


def layers(mib: int):
    """Layers that exist one at a time, as those of a model that is converted while it is read."""
    block = np.random.default_rng(0).standard_normal((RUN_ROWS, COLUMNS), dtype=np.float32)
    for number in range(mib * MIB // (ROWS * COLUMNS * 4)):
        yield f"layers.{number}.weight", np.tile(block, (ROWS // RUN_ROWS, 1))


def bare(address: str, scheme: str, mib: int) -> dict:
    """The loop of `demo/exchange.py`: a thread writes, the caller reads."""
    connection = flight.connect(address)
    list(connection.do_action("server.info"))
    started = Usage()
    command = json.dumps({"quantize": {"scheme": scheme}}).encode()
    writer, reader = connection.do_exchange(flight.FlightDescriptor.for_command(command))
    schema = pa.schema([("layer_name", pa.string()), ("weights", pa.large_binary()), ("dtype", pa.string()),
                        ("shape", pa.list_(pa.int64()))])

    def write():
        for name, array in layers(mib):
            for start in range(0, ROWS, RUN_ROWS):
                run = array[start:start + RUN_ROWS]
                offsets = pa.py_buffer(np.array([0, run.nbytes], np.int64))
                weights = pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, pa.py_buffer(run)])
                columns = [pa.array([name]), weights, pa.array(["f32"]), pa.array([array.shape], schema[3].type)]
                writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
            del array, run, weights, columns  # as frugal as a bare loop can be: one layer at a time
        writer.done_writing()

    writer.begin(schema)
    writing = threading.Thread(target=write)
    writing.start()
    rows = sum(chunk.data.num_rows for chunk in reader)
    writing.join()
    writer.close()
    return started.since(rows, mib)


def client(address: str, scheme: str, mib: int) -> dict:
    """The same through the package."""
    sys.path.insert(0, str(REPOSITORY / "client/python/src"))
    import quarrel

    with quarrel.connect(address) as connection:
        started = Usage()
        rows = sum(1 for _ in connection.quantize(layers(mib), scheme=scheme).runs())
        return started.since(rows, mib)


LOOPS = {"bare": bare, "client": client}


class Usage:
    """Time and memory of this process from now on."""

    def __init__(self):
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now on: proc(5)
        self.memory, self.cpu, self.wall = status("VmRSS"), cpu_seconds(), time.perf_counter()

    def since(self, rows: int, mib: int) -> dict:
        if rows != mib * MIB // (RUN_ROWS * COLUMNS * 4):
            raise AssertionError(f"{rows} rows came back")
        return {"cpu_seconds": cpu_seconds() - self.cpu, "seconds": time.perf_counter() - self.wall,
                "peak_mib": (status("VmHWM") - self.memory) / MIB}


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) * 1024


if __name__ == "__main__":
    main()
