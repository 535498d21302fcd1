# pykvm's commands. Start with `make demo`; `make help` lists the rest.

SHELL := /bin/bash
PYTHON := /usr/bin/python3
VENV := .venv

# Settings of pip, Python and git that are meant for other work of the user.
unexport PIP_USER PIP_TARGET PIP_PREFIX PIP_ROOT PYTHONHOME PYTHONPATH PYTHONUSERBASE
unexport GIT_DIR GIT_WORK_TREE GIT_INDEX_FILE GIT_OBJECT_DIRECTORY GIT_COMMON_DIR GIT_NAMESPACE

# The C that cffi writes for the extensions, and what they are compiled to.
GENERATED := pykvm/kvm/native/_kvm.c pykvm/devices/_devices.c \
	pykvm/devices/virtio/_virtio.c pykvm/devices/virtio/_vhost.c \
	pykvm/kernel/_uapi.c pykvm/network/_tun.c pykvm/sandbox/_sandbox.c pykvm/switch/_native.c

SOURCES := setup.py $(wildcard $(foreach folder,pykvm/* pykvm/kvm/native pykvm/devices/virtio, \
	$(folder)/build_*.py $(folder)/*.[ch]) pykvm/kvm/ioctls.py \
	pykvm/sandbox/system_calls.py \
	guest/*/*.[ch] kernel-patches/files/include/uapi/linux/*.h)
SOURCES := $(filter-out $(GENERATED),$(SOURCES))

.PHONY: help verify-gate setup demo demo-linux test selftests lint bench fuzz clean attacks fresh environment docs

help:
	@echo "make setup   install what is missing (Debian packages, $(VENV), C extensions)"
	@echo "make demo    send real packets between two guests: VMFUNC beside VMCALL and direct"
	@echo "make demo-linux  let two Linux guests use each other over virtio-net"
	@echo "make test    run every test, on this host and on the emulated Intel host (two kernels)"
	@echo "make attacks try every row of docs/threats.md, and its controls"
	@echo "make lint    check style and types"
	@echo "make docs    build the documentation site into build/docs"
	@echo "make selftests  compare KVM's own selftests, unpatched and patched, on SERIES='6.1 6.12' (default: what Debian offers)"
	@echo "make fuzz    let guests write anything into their windows at any moment, for FUZZ_SECONDS=60"
	@echo "make bench   measure the crossing, its protections, attaching, the switch and interrupts"
	@echo "make verify-gate  show that the gate is safe to enter at any byte"
	@echo "make fresh   run make demo and make test on a new Debian 12 that has nothing (DEBIAN=13, RUN=...)"
	@echo "make clean   remove everything that was built in this directory"

# A virtual environment holds for one place and one Python. The shell gets them as a variable,
# because a path may hold quotes.
setup $(VENV)/bin/python: export PLACE = $(CURDIR), $(shell $(PYTHON) --version 2>&1)

setup:
	@if [ -d $(VENV) ] && [ "$$(cat $(VENV)/.place 2>/dev/null)" != "$$PLACE" ]; then \
		echo 'setup: making $(VENV) anew: it is of another place or another Python'; \
		rm -rf $(VENV); \
	fi
	@$(MAKE) --no-print-directory environment

environment: $(VENV)/.extensions
	@:

$(VENV)/.packages: tools/install_packages.sh
	@tools/install_packages.sh
	@mkdir -p $(VENV) && touch $@

$(VENV)/bin/python: | $(VENV)/.packages
	$(PYTHON) -m venv $(VENV)
	@echo "$$PLACE" >$(VENV)/.place

$(VENV)/.installed: pyproject.toml setup.py | $(VENV)/bin/python
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-user --editable '.[dev]'
	@touch $@

# Installing built the extensions once; here they follow their C sources. An extension of another
# name (for one version of Python) would be found first, so the old ones go.
$(VENV)/.extensions: $(VENV)/.installed $(SOURCES)
	rm -f $(GENERATED:.c=.*.so)
	$(VENV)/bin/python setup.py --quiet build_ext --inplace --force
	@touch $@

demo: setup
	$(VENV)/bin/pykvm demo

demo-linux: setup
	$(VENV)/bin/pykvm demo-linux

# As many parts at a time as there are processors; their outputs follow one another.
test: setup
	$(VENV)/bin/python -m tools.test_all

# Two processors for each series: unpatched and patched hosts run at the same time. SELFTESTS may
# hold --all, or names.
SERIES = $(shell $(VENV)/bin/python -c \
	'from pykvm.kernel.series import offered_series; print(*offered_series())')
selftests: setup
	$(VENV)/bin/python -m tools.side_by_side --processors 2 \
		$(foreach series,$(SERIES),"$(strip $(VENV)/bin/pykvm kernel selftests --series $(series) $(SELFTESTS))")

FUZZ_SECONDS := 60
fuzz: setup
	$(VENV)/bin/python -m tools.fuzz --seconds $(FUZZ_SECONDS)

# One line for each row of docs/threats.md; not 0 while a row falls short. ATTACKS may hold
# --after-tests, which repeats nothing that make test has just run.
attacks: setup
	$(VENV)/bin/python -m tools.attacks --series $(SERIES) $(ATTACKS)

# The README's commands on a Debian that has nothing, or those in RUN="make setup && make demo".
# FRESH may hold --keep.
DEBIAN := 12
fresh:
	@$(PYTHON) -B -m tools.fresh --debian $(DEBIAN) $(if $(RUN),--run "$$RUN") $(FRESH)

lint: setup
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

# docs/api is generated anew, lest the page of a module that is gone stay.
docs: setup
	rm -rf docs/api build/docs build/doctrees
	$(VENV)/bin/sphinx-build --quiet --fail-on-warning --jobs auto -d build/doctrees docs build/docs
	@echo "docs: open build/docs/index.html"

bench: setup
	$(VENV)/bin/pykvm bench crossing --json build/bench/crossing.json
	$(VENV)/bin/pykvm bench protections --json build/bench/protections.json
	$(VENV)/bin/pykvm bench attach --json build/bench/attach.json
	$(VENV)/bin/pykvm bench switch --json build/bench/switch.json
	$(VENV)/bin/pykvm bench interrupts --json build/bench/interrupts.json

verify-gate: setup
	$(VENV)/bin/pykvm verify-gate

clean:
	rm -rf build docs/api $(VENV) *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -f $(GENERATED)
	find pykvm -name '*.so' -delete
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
