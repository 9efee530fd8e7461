# Two commands a newcomer needs: `make demo` and `make test`. Both make .venv themselves; a second run only checks stamps.
#
#   PYTHON       the interpreter that makes .venv (3.11 or later)
#   TORCH        the torch that is tested with
#   TORCH_INDEX  where its CPU build lies when no local or configured index has one

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# pip compiles what it installs in one process, a minute of it; COMPILE takes all cores. Some files are no Python 3.
INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --quiet --quiet --no-compile
COMPILE := $(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null 2>&1 || true
TORCH ?= 2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# What the tests need from the system: fusermount3 (mounts by other users than root), a web server that is not ours, etcd,
# ip (network namespaces for the nodes of a cluster).
DEBIAN_PACKAGES := fuse3 nginx etcd-server iproute2
# The Azure store is proved against azurite, which comes from npm: half a minute and 190 MB, once, where there is an npm.
AZURITE := $(VENV)/azurite/node_modules/.bin/azurite-blob
AZURITE_VERSION ?= 3.37.0

.DEFAULT_GOAL := help
.PHONY: help demo test check format bench clean system-packages azurite

help:
	@echo 'make demo    train from an S3 bucket through a mounted folder, on this machine'
	@echo 'make test    the gate: lint, types, import law, all tests'
	@echo 'make check   the gate without the tests'
	@echo 'make bench   the benchmarks, against native files and peers (minutes; an otherwise idle machine)'

$(VENV)/.made:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "orchestra needs Python 3.11 or later; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

# torch comes first, alone and pinned: left to a resolver on Linux it brings gigabytes of CUDA. The local version "+cpu"
# exists only on indexes of CPU builds, so that neither of the first two tries can end with a CUDA build; a machine
# with a GPU, and one that has no "+cpu" builds at all (macOS), gets the plain release.
$(VENV)/.torch: $(VENV)/.made
	@if nvidia-smi -L >/dev/null 2>&1 || [ "$$(uname -s)" != Linux ]; then \
		echo 'installing torch $(TORCH)'; $(INSTALL) 'torch==$(TORCH)'; \
	else \
		echo 'installing torch $(TORCH), CPU build'; \
		$(INSTALL) 'torch==$(TORCH)+cpu' 2>/dev/null || \
		$(INSTALL) --extra-index-url '$(TORCH_INDEX)' 'torch==$(TORCH)+cpu'; \
	fi
	@$(BIN)/python -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' > $@

# The stamp of torch is also the constraint that keeps it as it is.
$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	@echo 'installing orchestra and what the demo needs'
	@$(INSTALL) --constraint $(VENV)/.torch --editable '.[demo]'
	@$(COMPILE)
	@touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml
	@echo 'installing orchestra and what the tests need'
	@$(INSTALL) --constraint $(VENV)/.torch --editable '.[demo,dev,s3,torch]'
	@$(COMPILE)
	@touch $@ $(VENV)/.demo

system-packages:
	@missing=$$(for p in $(DEBIAN_PACKAGES); do dpkg -s $$p >/dev/null 2>&1 || echo $$p; done); \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "installing" $$missing; \
		(apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing) \
			>/dev/null 2>&1 || echo 'could not be installed, tests that need them will be skipped:' $$missing; \
	else echo "not installed, tests that need them will be skipped:" $$missing; fi

azurite: $(VENV)/.made
	@if [ -x $(AZURITE) ]; then exit 0; fi; \
	if ! command -v npm >/dev/null; then echo 'no npm: the tests on azurite will be skipped'; exit 0; fi; \
	echo 'installing azurite'; \
	timeout 180 npm install --silent --no-audit --no-fund --prefix $(VENV)/azurite azurite@$(AZURITE_VERSION) \
		>/dev/null 2>&1 || { rm -rf $(VENV)/azurite; echo 'azurite could not be installed: its tests will be skipped'; }

demo: $(VENV)/.demo
	@$(BIN)/orchestra demo

# Formatting is checked where it is the house's own: everything that git tracks or would.
check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

# One run, one closing line: `system` tests share one xdist group (tests/conftest.py), so that they go one after the
# other on one worker while the others run beside them.
test:
	@$(MAKE) --no-print-directory -j 3 system-packages azurite $(VENV)/.test
	@$(MAKE) --no-print-directory check
	@[ ! -x $(AZURITE) ] || export ORCHESTRA_AZURITE="$(CURDIR)/$(AZURITE)"; \
	echo '$(BIN)/python -m pytest -n 2 --dist loadgroup'; $(BIN)/python -m pytest -n 2 --dist loadgroup

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Each ends by itself, and refuses a busy machine; an hour in all.
bench: $(VENV)/.test
	for name in idle warm_read cold_read fuse cubes loaders eviction load overlap cluster; do \
		$(BIN)/python benchmarks/$$name.py || exit 1; \
	done

clean:
	rm -rf $(VENV) build dist *.egg-info
