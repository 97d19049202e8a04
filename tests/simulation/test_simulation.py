"""The simulator: nothing is found in what we ship, everything is found that was planted, and a seed replays."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections import Counter

import pytest

from callbackq.testing.simulation import draw, run, shrink, simulate, story
from callbackq.testing.simulation.__main__ import main
from callbackq.testing.simulation.campaign import run_seeds
from callbackq.testing.simulation.ledger import RULES
from callbackq.testing.simulation.scenario import FaultKind, Reaction
from simulation.planted import BUGS, HARMLESS, PAGE, PLANTED, PLANTED_IN_SQL, first_seed, row, seeds_of_bugs


@pytest.mark.parametrize(
    "start", [0, *(pytest.param(start, marks=pytest.mark.thorough) for start in range(300, 1800, 300))]
)
def test_no_promise_is_broken_on_the_store_in_memory(start: int) -> None:
    assert run_seeds(start, 300, store="memory", processes=1).failed == []


@pytest.mark.parametrize("start", range(0, 200, 50))
def test_no_promise_is_broken_on_sqlite(start: int) -> None:
    assert run_seeds(start, 50, store="sqlite", processes=1).failed == []


def test_every_kind_of_fault_and_mishap_takes_effect() -> None:
    counts: Counter[str] = Counter()
    for seed in range(300):
        counts += simulate(seed).counts

    seen = " ".join(counts)
    assert [kind.value for kind in (*FaultKind, *Reaction) if kind.value not in seen] == []
    effects = ["call during an outage", "write on a full disk", "hint lost", "mail fails", "mail hangs", "e-mail"]
    events = ["abandoned", "interrupted", "lock lost", "released", "cancelled", "store recovered", "local fault"]
    wanted = [*effects, *(f"event: {event}" for event in events), "takeovers", "second acceptances", "time is up"]
    assert [name for name in wanted if not counts[name]] == []


@pytest.mark.parametrize("seed", [1005410, 4209572, 4312192, 4319538, 6066434, 7373939, 10144005, 60484061])
def test_seeds_that_were_accused_wrongly_stay_acquitted(seed: int) -> None:
    # 1005410: an application whose last try to store came after the calm found its queue held.
    # 4209572: a request of a process that stood still between its look at the clock and its first byte, for longer than
    # its lock, came after the one of whoever took over.
    # 4312192: a moment's pause lasted as long as a mail server's hang within it.
    # 6066434: a pause within a longer one.
    # 7373939: the reply to a record was lost, and its callback purged before it was repeated.
    # 10144005: a late word about an interruption was taken from the attempts.
    # 60484061: of two words of a transport, the second came first after a freeze within a longer one.
    # 4319538: an id was stored, delivered and purged, and then stored anew by an application that had stood still.
    assert simulate(seed).violations == []


@pytest.mark.parametrize("store", ["memory", "sqlite"])
def test_a_seed_replays_byte_for_byte_in_another_process(store: str) -> None:
    command = [sys.executable, "-m", "callbackq.testing.simulation", "--log", "--seeds", "25", "--store", store]
    outputs = [
        subprocess.run(
            command, env={**os.environ, "PYTHONHASHSEED": hash_seed}, capture_output=True, check=True, timeout=50
        ).stdout
        for hash_seed in ("1", "4711")
    ]

    assert len(outputs[0].splitlines()) > 300
    assert hashlib.sha256(outputs[0]).digest() == hashlib.sha256(outputs[1]).digest()


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "store"), [*((name, "memory") for name in PLANTED), *((name, "sqlite") for name in PLANTED_IN_SQL)]
)
def test_a_planted_fault_is_found_and_the_page_says_by_which_seed(name: str, store: str) -> None:
    found = first_seed((PLANTED if store == "memory" else PLANTED_IN_SQL)[name], store=store)

    assert found is not None
    assert row(name, *found, store) in PAGE.read_text().splitlines()


def test_the_page_names_no_fault_that_is_not_planted() -> None:
    named = [line.split(" | ")[0].removeprefix("| ") for line in PAGE.read_text().splitlines() if line.endswith(" |")]

    assert named[1:] == [*PLANTED, *PLANTED_IN_SQL]


def test_the_page_names_every_bug_that_simulation_found() -> None:
    assert list(seeds_of_bugs()) == list(BUGS), "run python tests/simulation/planted.py --bugs"


@pytest.mark.parametrize("name", BUGS)
def test_a_bug_that_simulation_found_is_found_again_by_the_seed_on_the_page(name: str) -> None:
    seed, rule = seeds_of_bugs()[name]
    with BUGS[name]():
        broken = [violation.rule for violation in simulate(seed).violations]

    assert rule in broken, "run python tests/simulation/planted.py --bugs"
    assert simulate(seed).violations == []


@pytest.mark.parametrize("name", HARMLESS)
def test_what_breaks_no_promise_is_not_accused(name: str) -> None:
    assert first_seed(HARMLESS[name], 150) is None


BROKEN_BY = {
    "number": "numbers are used again",
    "not the head": "a retry lets the next one go",
    "not due": "what is due within a minute is taken now",
    "live lock": "locks live half as long",
    "token": "tokens repeat",
    "lease": "one lock more than asked for",
    "counts": "an abandoned lock counts as an attempt",
    "passed over": "the last of a batch is lost",
    "fencing": "a repeated record is answered as a lost lock",
    "verdict": "the retry delay is forgotten",
    "settled": "a late acceptance is forgotten",
    "stop": "a stop gives nothing back",
    "operator": "an operator may redeliver what was delivered",
    "purge": "callbacks are forgotten whatever they hold or owe",
    "sent without a lock": "recorded before it is sent",
    "sent again": "a result is dropped when the store raises",
    "parked": "a callback for a slow host is put off for an hour",
    "e-mail lost": "an e-mail is recorded before it is sent",
    "e-mail repeated": "an e-mail that was sent is still owed",
    "e-mail too soon": "no quiet after an e-mail",
    "state": "every third attempt isn't kept",
    "stuck": "an attempt that never ends keeps its slot",
    "raised": "the transport's second word counts, too",
}


def test_every_rule_of_the_ledger_is_broken_by_something() -> None:
    assert set(BROKEN_BY) == set(RULES)


@pytest.mark.thorough
@pytest.mark.parametrize("rule", BROKEN_BY)
def test_a_rule_of_the_ledger_can_be_broken(rule: str) -> None:
    assert first_seed(PLANTED[BROKEN_BY[rule]], 500, rule) is not None


def test_a_failing_scenario_is_shrunk_and_its_story_told() -> None:
    name = "a late acceptance is forgotten"
    found = first_seed(PLANTED[name])
    assert found is not None
    seed, rule = found
    with PLANTED[name]():
        whole = simulate(seed)
        small = shrink(whole)
        text = story(small)

    assert rule in {violation.rule for violation in small.violations}
    assert len(small.log) < len(whole.log)
    assert len(small.scenario.faults) <= len(whole.scenario.faults)
    assert f"--start {seed} --seeds 1 --store memory" in text
    assert all(str(planned) in text for planned in (*small.scenario.commands, *small.scenario.faults))
    assert f"{rule} {small.violations[0].callback_id}: {small.violations[0].detail}" in text


def test_a_scenario_is_plain_data_that_can_be_changed_and_run_again() -> None:
    scenario = draw(5)

    assert run(scenario).text() == run(scenario).text()


def test_the_command_prints_figures_and_tells_a_failing_seed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seeds", "3", "--start", "1"]) == 0
    assert "3 schedules from seed 1 on memory" in capsys.readouterr().out

    name = "the retry delay is forgotten"
    found = first_seed(PLANTED[name])
    assert found is not None
    with PLANTED[name]():
        assert main(["--seeds", "1", "--start", str(found[0])]) == 1
    assert "broke" in capsys.readouterr().out
