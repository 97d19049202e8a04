# What there is to make. `make check` is what must pass for every commit.

PYTHON ?= .venv/bin/python

# Tracing has locks of its own, which a fork beside other threads leaves locked in the child.
TRACEABLE = not forked_while_threads

# Storms in which locks of the killed don't hold up everything, and in which many are frozen at a time.
MANY = --queues 2000 --alone 0.3 --backlog 2000 --pause 0.01 0.05
FROZEN = --frozen 4 --processes 6 --lease 3 --pause 0.05 0.2
# Several machines on one PostgreSQL database, whose server is restarted, too.
MACHINES = --kills 1000 --queues 200 --processes 3 --server-restarts 30

.DEFAULT_GOAL := help
.PHONY: help venv format lint test system thorough conformance cover docs bench bench-peers crash-points power-cuts
.PHONY: postgres-proof storm soak hostile fuzz simulate proof pythons demo check build clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv:  ## make .venv with everything for development
	python3 -m venv .venv
	.venv/bin/pip install -q -U pip
	.venv/bin/pip install -q -e . --group dev

format:  ## put all code into its form
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

lint:  ## check form, lint and types
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy
	$(PYTHON) -m basedpyright

test:  ## run the tests that need no real processes
	$(PYTHON) -m pytest -q -n 2 -m "not system and not thorough"

system:  ## run the tests with real processes, sockets and kills
	$(PYTHON) -m pytest -q -m "system and not thorough"

thorough:  ## run all tests, those, too, that try again what others try in short
	$(PYTHON) -m pytest -q -n 2 -m ""

conformance:  ## run the suite for stores on those shipped, and on the broken ones it must catch
	$(PYTHON) -m pytest -q -m "" tests/stores tests/conformance

cover:  ## run all tests; every branch of the core and 95 % of the package must be taken
	$(PYTHON) -m coverage erase
	$(PYTHON) -m coverage run -m pytest -q -n 2 -m "" -k "$(TRACEABLE)"
	$(PYTHON) -m coverage combine -q
	$(PYTHON) -m coverage report --fail-under=95
	$(PYTHON) -m coverage report --include='*/callbackq/core/*' --fail-under=100

docs:  ## build the documentation; warnings are errors
	$(PYTHON) -m sphinx -q -n -W --keep-going -b html docs docs/_build/html
	@echo docs/_build/html/index.html

bench:  ## measure everything about speed on this machine, and write figures and chart into the pages
	$(PYTHON) benchmarks/speed.py

bench-peers:  ## measure other libraries beside callbackq, and write that into the pages, too
	$(PYTHON) benchmarks/peers.py

crash-points:  ## end a dispatcher's process at every boundary between store, transport, notifier and statement
	$(PYTHON) benchmarks/crash_points.py
	$(PYTHON) benchmarks/crash_points.py --store postgres

power-cuts:  ## cut the power at 10,000 moments of an SQLite store's work, in each of its modes
	$(PYTHON) benchmarks/power_cuts.py
	$(PYTHON) benchmarks/power_cuts.py --journal rollback
	$(PYTHON) benchmarks/power_cuts.py --durability process
	$(PYTHON) benchmarks/power_cuts.py --durability process --journal rollback

storm:  ## kill dispatchers 3,000 times, stop them 1,300 times, freeze them 500 times, over a million callbacks
	$(PYTHON) benchmarks/storm.py --kills 2000 --callbacks 760000 $(MANY)
	$(PYTHON) benchmarks/storm.py --store postgres --kills 1000 --callbacks 250000 $(MANY)
	$(PYTHON) benchmarks/storm.py --stops 1000
	$(PYTHON) benchmarks/storm.py --store postgres --stops 300
	$(PYTHON) benchmarks/storm.py --freezes 250 $(FROZEN)
	$(PYTHON) benchmarks/storm.py --store postgres --freezes 250 $(MANY) $(FROZEN)

postgres-proof:  ## try several machines on PostgreSQL: order of commits, claims behind an old snapshot, kills, restarts
	$(PYTHON) benchmarks/commit_order.py --callbacks 100000
	$(PYTHON) benchmarks/claim.py --store postgres --old-snapshot 200000
	$(PYTHON) benchmarks/storm.py --store postgres $(MACHINES)

soak:  ## have a dispatcher live for an hour at 200 callbacks/s, while another is killed every minute
	$(PYTHON) benchmarks/soak.py --minutes 60 --rate 200

hostile:  ## measure what hostile receivers do to a dispatcher: nothing late, nothing grown, nothing mixed up
	$(PYTHON) benchmarks/hostile.py

fuzz:  ## throw a million malformed URLs, answers and documents at the parsers
	$(PYTHON) benchmarks/fuzz.py --urls 400000 --answers 400000 --retry-after 50000 --documents 150000

simulate:  ## run 20,000 simulated worlds and the small one in every order, and plant faults that must be found
	$(PYTHON) -m callbackq.testing.simulation --seeds 20000 --processes 2
	$(PYTHON) -m callbackq.testing.simulation --seeds 1000 --store sqlite --processes 2
	$(PYTHON) -m callbackq.testing.simulation --small-scope 2
	$(PYTHON) tests/simulation/planted.py

proof:  ## run the short proof: 2,000 simulated worlds and a storm of 50 kills, and say how long it took
	@$(PYTHON) benchmarks/proof.py

pythons:  ## prove it in short on each Python that is promised and on this machine
	$(PYTHON) benchmarks/pythons.py

demo:  ## watch the promises hold while a dispatcher is killed
	$(PYTHON) -m callbackq demo

check: lint test system docs  ## all that must pass for every commit

build:  ## build the sdist and the wheel into dist/
	$(PYTHON) -m build

clean:  ## remove what the other targets made, but not .venv
	rm -rf dist docs/_build .coverage .coverage.* .mypy_cache .pytest_cache .ruff_cache .hypothesis
