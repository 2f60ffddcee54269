"""Commands as the caller may write them: a dict is the JSON form, and `encode` makes protobuf of the same dict by hand.

The table repeats proto/quarrel/v1/command.proto, so that a change of the contract's numbers fails a test.
"""

import struct

from harness.frames import blob, integer

TEXT, NUMBER, FLAG, DOUBLE = "text", "number", "flag", "double"
FIELDS = {
    "Command": {
        "quantize": (2, "Quantize"), "dequantize": (3, "Dequantize"), "measure": (5, "Measure"),
        "source": (6, TEXT), "sink": (7, TEXT),
    },
    "Quantize": {
        "scheme": (1, TEXT), "recipe": (2, "Recipe"), "profile": (3, TEXT), "group_size": (4, NUMBER),
        "channel_dims": (5, NUMBER), "arith": (6, TEXT), "on_error": (7, TEXT), "on_indivisible": (8, TEXT),
        "return_kept": (9, FLAG), "fallback": (10, "Ladder"), "amax": (11, DOUBLE),
    },
    "Dequantize": {"dtype": (1, TEXT)},
    "Measure": {},
    "Recipe": {"rules": (1, "Rule"), "ignore": (2, TEXT)},
    "Rule": {
        "targets": (1, TEXT), "scheme": (2, TEXT), "group_size": (3, NUMBER), "channel_dims": (4, NUMBER),
        "on_indivisible": (5, TEXT), "fallback": (6, "Ladder"), "amax": (7, DOUBLE),
    },
    "Ladder": {"schemes": (1, TEXT), "sqnr_db_min": (2, DOUBLE), "cosine_min": (3, DOUBLE)},
}


def encode(command: dict, message: str = "Command") -> bytes:
    """Protobuf of a command given as its JSON dict."""
    out = b""
    for name, value in command.items():
        number, kind = FIELDS[message][name]
        for item in value if isinstance(value, list) else [value]:
            out += _field(number, kind, item)
    return out


def _field(number: int, kind: str, value) -> bytes:
    match kind:
        case "text":
            return blob(number, value.encode())
        case "number" | "flag":
            return integer(number, int(value))
        case "double":
            return bytes([number << 3 | 1]) + struct.pack("<d", value)
        case _:
            return blob(number, encode(value, kind))


def quantize(scheme: str, **options) -> dict:
    return {"quantize": {"scheme": scheme, **options}}


def recipe(*rules: dict, ignore=(), **options) -> dict:
    return {"quantize": {"recipe": {"rules": list(rules), "ignore": list(ignore)}, **options}}


def dequantize(**options) -> dict:
    return {"dequantize": options}
