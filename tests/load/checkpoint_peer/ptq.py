"""llm-compressor's `model_free_ptq` on a folder: `ptq.py SRC DST SCHEME`. Prints seconds without imports, and the peak resident set."""

import json
import resource
import sys
import time

import torch
from llmcompressor import model_free_ptq

source, destination, scheme = sys.argv[1:]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
began = time.perf_counter()
model_free_ptq(source, destination, scheme=scheme, ignore=["lm_head", "re:.*embed_tokens"], device=torch.device("cpu"))
seconds = time.perf_counter() - began
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"seconds": seconds, "peak_kib": peak, "imports_kib": before}))
