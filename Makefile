# make help lists what there is. `make demo` and `make test` do all the set-up themselves; the second time they skip it.

VENV := .venv
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.ready
# The scripted driver that the lab's GPU half plays on where there is no GPU.
STANDINS := build/lab
# What a rebuild depends on: the package's description and everything compiled.
SOURCES := pyproject.toml setup.py scripts/setup.sh $(wildcard ext/*.pyx ext/*.pxd ext/*.pxi ext/*.h ext/*/*.c ext/*/*.h)

.DEFAULT_GOAL := help
.PHONY: help setup demo test check check-ptx lint types tidy bench fuzz asan fixtures fixtures-matrix soak lab-captures lab-sample stubs lock reference picture dist clean

help:  ## this list
	@grep -hE '^[a-z%-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 12

$(READY): $(SOURCES)
	@sh scripts/setup.sh $(VENV)
	@touch $@

setup: $(READY)  ## make .venv/, install what is missing, build the compiled parts

$(STANDINS)/.built: $(READY) $(wildcard tests/standins/*.py tests/standins/*/*)
	@$(PYTHON) tests/standins/build.py $(STANDINS)
	@$(PYTHON) tests/standins/libnvidia_ml/build.py $(STANDINS)
	@touch $@

demo: $(READY) $(STANDINS)/.built  ## the incident lab: a real tunnel and a real launching process, named and acted on
	$(VENV)/bin/gpuguard demo --standins $(STANDINS)

test: $(READY)  ## all tests; what is skipped says why
	$(PYTHON) -m pytest

check: $(READY) lint types tidy  ## everything static

lint: $(READY)  ## ruff
	$(VENV)/bin/ruff check .

types: $(READY)  ## mypy --strict
	$(VENV)/bin/mypy

tidy: $(READY)  ## the house rules, over the source
	$(PYTHON) -m pytest -q tests/test_tidy.py

check-ptx:  ## compile every CUDA kernel for four architectures, without a GPU (about 1 GB of compilers in build/ptx)
	@sh scripts/check_ptx.sh

bench-%: $(READY)  ## one benchmark: benchmarks/NAME.py
	$(PYTHON) benchmarks/$(subst -,_,$*).py

bench: $(READY)  ## all benchmarks; fails if one missed its target
	@failed=; for file in benchmarks/[a-z]*.py; do \
	  echo "== $$file"; $(PYTHON) "$$file" || failed="$$failed $$file"; \
	done; test -z "$$failed" || { echo "missed:$$failed"; exit 1; }

fuzz: $(READY)  ## every property over fresh input, for GPUGUARD_FUZZ_SECONDS (default 300)
	@sh scripts/fuzz.sh $(PYTHON) $${GPUGUARD_FUZZ_SECONDS:-300}

asan: $(READY)  ## tests of the packet parser and the machine-code decoder, built under the compiler's sanitizers
	@PYTHON=$(abspath $(PYTHON)) sh tests/asan_packets.sh -q
	@PYTHON=$(abspath $(PYTHON)) sh tests/asan_sass.sh -q

lab-captures: $(READY)  ## labelled captures of SSH, tunnels and other talk by real programs, in build/lab-captures (as root, ten minutes)
	@sh scripts/lab_peers.sh $(VENV)
	$(PYTHON) -m gpuguard.lab.captures build/lab-captures

lab-sample: $(READY)  ## the part of build/lab-captures that is committed and drives tests
	$(PYTHON) -m gpuguard.lab.sample build/lab-captures tests/fixtures/captures 2600000

fixtures:  ## compile tests/fixtures/cuda to cubins (nvcc from PATH, or its wheels in build/nvcc)
	@sh scripts/fixtures.sh

fixtures-matrix:  ## compile them for more architectures, unrolled or not, with other flags, to build/matrix
	@sh scripts/fixtures.sh --matrix

soak: $(READY) $(STANDINS)/.built  ## the demo, twenty times in a row
	$(PYTHON) -m gpuguard.lab.soak --times 20 --standins $(STANDINS)

stubs:  ## regenerate gpuguard/api/v1 (in a venv of its own: the generator forces an old protobuf)
	@sh scripts/stubs.sh

lock: $(READY)  ## record the version and digest of every signature in signatures/signatures.lock
	$(PYTHON) -m gpuguard.signature_files signatures

reference: $(READY)  ## rewrite the table of settings in docs/configuration.md
	$(PYTHON) scripts/reference.py

picture: $(READY)  ## redraw the incident that the README shows
	$(PYTHON) scripts/picture.py

dist: $(READY)  ## wheel and sdist in dist/
	$(PYTHON) -m pip wheel --no-deps --wheel-dir dist .

clean:  ## remove what was built; .venv/ stays
	rm -rf build dist *.egg-info gpuguard/bpf ext/*.c gpuguard/*.so
