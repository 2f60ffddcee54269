"""How much memory the server takes under the streams that could take much: its resident set, all the while.

Each scene has a server of its own with `memory_bytes_max` of 256 MiB, and without huge pages, as in the image. What counts is that the curve is flat once it has risen: the highest of its second
half is within 10 % of the highest of its first. Prints a table and the curves, and writes them under `results/`.
"""

import argparse
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from pyarrow import flight

import client
import layers
import rows
from machine import environment
from server import Server

LOAD = Path(__file__).resolve().parent
REPOSITORY = LOAD.parent.parent
MIB = 1 << 20
FLAGS = {
    "memory-bytes-max": 256 * MIB, "layer-bytes-max": 128 * MIB, "streams-max": 64, "connections-max": 128,
    # Readers stop for a minute here, and are not to be told off.
    "stall-seconds": 120, "idle-seconds": 180,
}
FLAT = 1.10
EVERY_SECONDS = 0.1
BARS = " ▁▂▃▄▅▆▇█"


@dataclass
class Scene:
    name: str
    run: Callable[[str, float], int]  # where the server is, how much of it to do; returns the bytes sent


def endless(count: int, scheme_rows: list[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The runs of one layer again and again, under names of their own."""
    for number in range(count):
        for batch in scheme_rows:
            yield batch.set_column(0, "layer_name", pa.array([f"layers.{number}.weight"]))


def send(address: str, scheme: str, batches: Iterator[pa.RecordBatch], pause: Callable[[int], float] = lambda _: 0) -> int:
    """Writes in a thread, reads here and waits as `pause` says of each answer. Returns how many rows came back."""
    connection = client.connect(address)
    options = flight.FlightCallOptions(timeout=1800)
    writer, reader = connection.do_exchange(flight.FlightDescriptor.for_command(rows.quantize(scheme)), options)
    with writer:
        writer.begin(layers.f32(64)[0].schema)

        def write() -> None:
            for batch in batches:
                writer.write_batch(batch)
            writer.done_writing()

        writing = threading.Thread(target=write)
        writing.start()
        count = 0
        for chunk in reader:
            count += chunk.data.num_rows
            time.sleep(pause(count))
        writing.join()
    return count


def one_long_stream(address: str, share: float) -> int:
    count = max(1, int(745 * share))  # 50 GB in layers of 64 MiB
    return send(address, "int8", endless(count, layers.f32(64))) * layers.RUN_BYTES


def many_streams(address: str, share: float) -> int:
    count = max(1, int(8 * share))
    with ThreadPoolExecutor(64) as threads:
        done = [threads.submit(send, address, "W4A16", endless(count, layers.f32(64))) for _ in range(64)]
        return sum(found.result() for found in done) * layers.RUN_BYTES


def readers_that_stop(address: str, share: float) -> int:
    """Eight streams whose readers stop for a minute after 64 answers, and one that goes on."""
    def stop(count: int) -> float:
        return 60 * share if count == 64 else 0

    with ThreadPoolExecutor(9) as threads:
        done = [threads.submit(send, address, "int8", endless(8, layers.f32(64)), stop) for _ in range(8)]
        done.append(threads.submit(send, address, "int8", endless(max(8, int(160 * share)), layers.f32(64))))
        return sum(found.result() for found in done) * layers.RUN_BYTES


def one_large_layer(address: str, share: float) -> int:
    """4 GiB in runs of 1 MiB under one name."""
    count = max(1, int(64 * share))
    shape = pa.array([[count * layers.ROWS, layers.COLUMNS]], pa.list_(pa.int64()))
    runs = layers.f32(64)
    at = runs[0].schema.get_field_index("shape")
    large = (batch.set_column(at, "shape", shape) for _ in range(count) for batch in runs)
    return send(address, "int8", large) * layers.RUN_BYTES


def whole_layers(address: str, share: float) -> int:
    """A scale for each tensor: the server holds whole layers of 64 MiB, as many at a time as it has room for."""
    count = max(1, int(8 * share))
    with ThreadPoolExecutor(8) as threads:
        done = [threads.submit(send, address, "int8/tensor", endless(count, layers.f32(64))) for _ in range(8)]
        return sum(found.result() for found in done) * layers.RUN_BYTES


SCENES = [
    Scene("one stream of 50 GB", one_long_stream),
    Scene("64 streams at once, W4A16", many_streams),
    Scene("8 readers stop for a minute", readers_that_stop),
    Scene("one layer of 4 GiB in runs", one_large_layer),
    Scene("8 streams, scale per tensor", whole_layers),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a twentieth of it: for a look, not for a claim")
    parser.add_argument("--binary", type=Path, default=REPOSITORY / "target/release/quarrel", help="our server")
    parser.add_argument("--results", type=Path, default=LOAD / "results", help="folder of the raw output")
    options = parser.parse_args()
    record = environment(REPOSITORY, options.binary) | {"command": " ".join(sys.argv), "flags": str(FLAGS)}
    found = [watched(scene, options.binary, 0.05 if options.quick else 1.0) for scene in SCENES]
    text = "\n".join([*(f"{key}: {value}" for key, value in record.items()), "", *table(found)])
    print(text)
    options.results.mkdir(parents=True, exist_ok=True)
    name = f"{record['date'][:19].replace(':', '')}Z-{record['commit'].split()[0]}-memory"
    (options.results / f"{name}.txt").write_text(text + "\n")
    (options.results / f"{name}.json").write_text(json.dumps(record | {"scenes": found}) + "\n")
    return 0


def watched(scene: Scene, binary: Path, share: float) -> dict:
    """Runs a scene, and looks at its server's memory ten times a second."""
    print(scene.name, file=sys.stderr)
    flags = [word for name, value in FLAGS.items() for word in (f"--{name}", str(value))]
    with Server(["env", "MIMALLOC_ALLOW_THP=0", str(binary), "serve", "--listen", "127.0.0.1:0", "--log", "warn", *flags]) as server:
        curve, over = [], threading.Event()

        def watch() -> None:
            status = Path(f"/proc/{server.process.pid}/status")
            while not over.wait(EVERY_SECONDS):
                curve.append(int(re.search(r"^VmRSS:\s+(\d+) kB$", status.read_text(), re.M)[1]) // 1024)

        watching = threading.Thread(target=watch)
        watching.start()
        start = time.perf_counter()
        try:
            moved = scene.run(server.address, share)
        finally:
            over.set()
            watching.join()
        return {"name": scene.name, "bytes": moved, "seconds": time.perf_counter() - start, "rss_mib": curve}


def table(found: list[dict]) -> list[str]:
    lines = [f"{'resident set, MiB':<32}{'GB':>8}{'s':>8}{'1st half':>10}{'2nd half':>10}{'ratio':>8}  flat within 10 %"]
    for scene in found:
        curve = scene["rss_mib"]
        first, second = max(curve[: len(curve) // 2], default=0), max(curve[len(curve) // 2:], default=0)
        ratio = second / max(first, 1)
        lines.append(
            f"{scene['name']:<32}{scene['bytes'] / 1e9:>8.1f}{scene['seconds']:>8.1f}{first:>10}{second:>10}{ratio:>8.2f}  "
            + ("yes" if ratio <= FLAT else "NO")
        )
    lines += ["", "the curves, each from 0 to its highest:"]
    lines += [f"{scene['name']:<32}{drawn(scene['rss_mib'])}" for scene in found]
    return lines


def drawn(curve: list[int], width: int = 72) -> str:
    step = max(1, len(curve) // width)
    highest = [max(curve[at:at + step]) for at in range(0, len(curve), step)]
    return "".join(BARS[value * (len(BARS) - 1) // max(highest)] for value in highest)


if __name__ == "__main__":
    sys.exit(main())
