"""What the Python tests share: a server process, the wire as pyarrow sees it, the wire as bytes, and plain oracles.

- `server`: starts `quarrel serve`, watches it, stops it.
- `wire`: layers to record batches; exchanges as a user of pyarrow would write them.
- `frames`: Flight messages by hand over grpcio: exact codes, broken frames, held streams.
- `command`: commands as JSON or as hand-written protobuf.
- `oracle`: the formulas of SPEC.md in numpy, for tests whose golden is computed.
"""
