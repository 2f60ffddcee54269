"""The README's Python examples do what they say: each runs as a user would run it, against a running server.

An example is a fenced `python` block right after `<!-- test: NAME -->`. Only the server's address and its bucket are replaced; beside
the script lies MiniLM's `model.safetensors`, the checkpoint that the examples read.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.append(str(REPOSITORY))

from demo import models  # noqa: E402

README = REPOSITORY / "README.md"
ADDRESS = "grpc://127.0.0.1:8815"
BUCKET = "s3://models/quantized"
MARK = re.compile(r"^<!-- test: (?P<name>\S+) -->\n+```python\n(?P<code>.*?)^```$", re.M | re.S)
seconds_max = 300


def examples(text: str) -> dict[str, str]:
    return {found["name"]: found["code"] for found in MARK.finditer(text)}


EXAMPLES = examples(README.read_text(encoding="utf-8")) if README.is_file() else {}


def test_every_marked_block_of_the_readme_is_an_example():
    """A misspelt mark or a second use of a name would leave a block untested without a word."""
    text = README.read_text(encoding="utf-8")
    assert EXAMPLES, "README.md has no example to test"
    assert text.count("<!-- test:") == len(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_of_the_readme_runs_as_printed(fresh_server, tmp_path, name):
    code = EXAMPLES[name]
    server = fresh_server("--allow-write", tmp_path)
    assert ADDRESS in code, f"`{name}` should connect to {ADDRESS}"
    (tmp_path / "model.safetensors").symlink_to(models.minilm() / "model.safetensors")
    (tmp_path / "example.py").write_text(code.replace(ADDRESS, server.location).replace(BUCKET, f"file://{tmp_path}"), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error", "example.py"], cwd=tmp_path, timeout=seconds_max, capture_output=True, text=True,
        # As `pip install ./client/python` would have it; tests/clients/test_fresh_install.py does install it.
        env=os.environ | {"PYTHONPATH": str(REPOSITORY / "client/python/src")},
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip(), f"`{name}` printed nothing: a reader would not see that it worked"
