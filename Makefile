# Everything that people and CI run. Each target installs what it needs: cargo, python3 with venv and pip are enough.

PYTHON ?= python3
VENV := .venv
VENV_GOLDEN := .venv-golden
VENV_INTEROP := .venv-interop
VENV_BENCH := .venv-bench
VENV_PTQ := .venv-ptq
PY := $(VENV)/bin/python
DIST := target/dist/quarrel
FUZZ := target/fuzz
FUZZ_SECONDS ?= 60
FUZZ_TARGETS ?= safetensors gguf model columns command scheme frames stream
CARGO_BUILD := cargo build --release --locked --workspace
export PYTHONDONTWRITEBYTECODE := 1

.PHONY: help build demo test test-rust test-python test-asan test-valgrind fuzz lint proto golden test-interop bench bench-python bench-kernels bench-memory bench-checkpoint bench-gguf load-test profile choosing docker-build docker-check clean

help: ## This list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

build: ## The server, as target/release/quarrel
	$(CARGO_BUILD)

demo: build $(VENV)/installed ## Quantize a real model end to end (downloads it once, 84 MB)
	$(PY) -m demo

test: test-rust test-python ## Every test (not bench, golden)

test-rust: build
	cargo test --release --locked --workspace

test-python: build $(VENV)/installed
	$(PY) -m pytest -n 2 tests

# The option is unstable, the sanitizer is not: it comes with every toolchain. The standard library is not instrumented.
test-asan: ## The kernels' tests under AddressSanitizer, every CPU level (minutes)
	RUSTC_BOOTSTRAP=1 RUSTFLAGS=-Zsanitizer=address CARGO_TARGET_DIR=target/asan \
		cargo test --release --locked --package quarrel-kernels --lib --tests --target $$(rustc -vV | sed -n 's/^host: //p')

# Valgrind has no AVX-512, and is fifty times slower: fewer lengths and cases.
test-valgrind: ## The kernels' tests under valgrind, which must be installed: levels scalar and avx2 (minutes)
	valgrind --version
	QUARREL_TEST_LEVELS=scalar,avx2 QUARREL_TEST_QUICK=1 cargo test --release --locked --package quarrel-kernels \
		--test conformance --config 'target."cfg(unix)".runner = "valgrind --error-exitcode=1"'

# What cargo-fuzz would say to the compiler; the sanitizer is there so that every allocation is seen. A g++ builds libFuzzer itself.
fuzz: ## Each reader fuzzed for FUZZ_SECONDS (60) seconds; a panic, 2 s for one input or 256 MiB in one piece end it
	cp Cargo.lock tests/fuzz/Cargo.lock
	RUSTC_BOOTSTRAP=1 CARGO_TARGET_DIR=$(FUZZ) RUSTFLAGS="-Zsanitizer=address -Cpasses=sancov-module \
		-Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
		-Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares \
		-Ccodegen-units=1" \
		cargo build --release --manifest-path tests/fuzz/Cargo.toml --target $$(rustc -vV | sed -n 's/^host: //p')
	sh tests/fuzz/run.sh $(FUZZ) $(FUZZ_SECONDS) $(FUZZ_TARGETS)

lint: $(VENV)/installed ## Format, clippy, docs and types, warnings as errors; whether the fuzz targets build
	cargo fmt --all --check
	cargo fmt --manifest-path tests/fuzz/Cargo.toml --check
	cd client/python && ../../$(PY) -m mypy --cache-dir=../../.cache/mypy
	cargo clippy --release --locked --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --release --locked --workspace --no-deps
	cp Cargo.lock tests/fuzz/Cargo.lock
	cargo check --manifest-path tests/fuzz/Cargo.toml --target-dir $(FUZZ)

proto: ## Regenerate proto/src/generated from proto/quarrel
	QUARREL_REGENERATE=1 cargo test --release --locked --package quarrel-tidy checked_in_code

test-interop: build ## Real torch, compressed-tensors, transformers and Azure's emulator on our tensors, files and models, in a fresh environment (4.5 GB, minutes); writes tests/interop/results
	$(PYTHON) -m venv --clear $(VENV_INTEROP)
	$(VENV_INTEROP)/bin/pip install --quiet --no-deps -r tests/golden/requirements.txt -r tests/interop/peers/requirements.txt
	@if command -v npm >/dev/null; then npm install --silent --prefix $(VENV_INTEROP)/azurite azurite@3.35.0; else echo "no npm: without Azure's emulator"; fi
	$(VENV_INTEROP)/bin/python tests/interop/peers/run.py

golden: $(VENV)/installed $(VENV_PTQ)/installed ## Regenerate tests/golden/files with compressed-tensors, in a fresh environment, llm-compressor and ggml (9 GB, minutes)
	$(PYTHON) -m venv --clear $(VENV_GOLDEN)
	$(VENV_GOLDEN)/bin/pip install --quiet --no-deps -r tests/golden/requirements.txt
	$(VENV_GOLDEN)/bin/python tests/golden/generate.py
	$(PY) tests/golden/model_free.py --peer $(VENV_PTQ)/bin/python
	$(PY) tests/golden/ggml.py
	$(PY) tests/golden/gguf_files.py
	$(VENV_GOLDEN)/bin/python tests/golden/llama_files.py
	$(VENV_GOLDEN)/bin/python tests/golden/bnb.py
	$(VENV_GOLDEN)/bin/pip install --quiet --no-deps setuptools==80.9.0 wheel==0.45.1
	$(VENV_GOLDEN)/bin/pip install --quiet --no-deps --no-build-isolation -r tests/golden/half_quadratic.txt
	$(VENV_GOLDEN)/bin/python tests/golden/half_quadratic.py
	git diff --exit-code -- tests/golden
	test -z "$$(git status --porcelain tests/golden)"

bench: build $(VENV)/installed ## Exchange beside memcpy, TCP and the C++ pyarrow server; writes tests/load/results
	$(PY) tests/load/bench.py

bench-memory: build $(VENV)/installed ## The server's memory under long, many, stopped, large and buffering streams; writes tests/load/results (3 minutes)
	$(PY) tests/load/memory.py

load-test: build $(VENV)/installed ## 200 streams of random sizes, speeds, cancels and faults for 5 minutes; writes tests/load/results
	$(PY) tests/load/storm.py

profile: build $(VENV)/installed ## Where the CPU time of an exchange goes, by perf, which must be installed; writes tests/load/results
	$(PY) tests/load/profile.py

bench-python: build $(VENV)/installed ## The Python package beside a bare pyarrow loop: CPU and peak memory; writes tests/load/results
	$(PY) tests/load/python_overhead.py --rounds 7

bench-kernels: $(VENV)/installed $(VENV_BENCH)/installed ## Each format on one core beside memcpy and what others compute it with (4.3 GB once); writes tests/load/results
	cargo bench --locked --package quarrel-kernels --bench speed --no-run
	$(PY) tests/load/kernels.py --peers $(VENV_BENCH)/bin/python

bench-checkpoint: build $(VENV)/installed $(VENV_PTQ)/installed ## A model's folder to folder beside llm-compressor's model_free_ptq and a copy; their bytes compared (5 GB once); writes tests/load/results
	$(PY) tests/load/checkpoint.py --peer $(VENV_PTQ)/bin/python

bench-gguf: build $(VENV)/installed ## A GGUF file to another beside llama-quantize, byte for byte the same (llama.cpp is built once, 5 minutes); writes tests/load/results
	$(PY) tests/load/gguf.py

choosing: build $(VENV)/installed ## The table of docs/CHOOSING.md: what each scheme loses on a real model, and the speeds of the newest bench-kernels
	$(PY) tests/load/choosing.py

$(VENV)/installed: tests/requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet -r tests/requirements.txt
	touch $@

$(VENV_BENCH)/installed: tests/load/kernel_peers/requirements.txt tests/golden/requirements.txt tests/golden/half_quadratic.txt
	$(PYTHON) -m venv $(VENV_BENCH)
	$(VENV_BENCH)/bin/pip install --quiet --no-deps -r tests/load/kernel_peers/requirements.txt setuptools==80.9.0 wheel==0.45.1
	$(VENV_BENCH)/bin/pip install --quiet --no-deps --no-build-isolation -r tests/golden/half_quadratic.txt
	touch $@

$(VENV_PTQ)/installed: tests/load/checkpoint_peer/requirements.txt
	$(PYTHON) -m venv $(VENV_PTQ)
	$(VENV_PTQ)/bin/pip install --quiet --no-deps -r tests/load/checkpoint_peer/requirements.txt
	touch $@

# No container engine runs in CI, so the image's RUN lines are these targets; tests/tidy holds the two equal.
docker-build: ## What the image's build stage runs
	cargo build --locked --profile dist --bin quarrel

# debian:bookworm-slim has these libraries. 32 MiB: room to grow from the 9 MB of version 0.1.
docker-check: ## What the image promises of the binary it ships: it runs, needs libc alone, and is small
	$(DIST) --version
	$(DIST) serve --help >/dev/null
	@ldd $(DIST) | awk '$$1 !~ /^(linux-vdso|libc|libm|libgcc_s)\.so|\/ld-linux-/ { print "needs " $$0; found = 1 } END { exit found }'
	@bytes=$$(wc -c <$(DIST)); echo "$(DIST): $$bytes bytes"; test $$bytes -lt 33554432

clean:
	rm -rf target $(VENV) $(VENV_GOLDEN) $(VENV_INTEROP) $(VENV_BENCH) $(VENV_PTQ)
