"""Makes a failing scenario smaller, for as long as it breaks the same promise."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from attrs import evolve

from callbackq.testing.simulation.run import Report, run
from callbackq.testing.simulation.scenario import Command, CommandKind, Fault, Scenario

__all__ = ["shrink"]

_MOST_RUNS: Final = 600


def shrink(report: Report) -> Report:
    """
    Leave out faults, commands, callbacks, machines and mishaps of receivers while the first broken rule stays broken.

    Args:
        report: of a run that broke a promise.

    Returns:
        The report of the smallest scenario that was found.
    """
    rule = report.violations[0].rule
    smallest, runs = report, 0
    is_smaller = True
    while is_smaller and runs < _MOST_RUNS:
        is_smaller = False
        for candidate in _smaller(smallest.scenario):
            runs += 1
            tried = run(candidate)
            if any(violation.rule == rule for violation in tried.violations):
                smallest, is_smaller = tried, True
                break
            if runs >= _MOST_RUNS:
                break
    return smallest


def _smaller(scenario: Scenario) -> Iterator[Scenario]:
    """Scenarios that lack one thing, those that lack most first."""
    for number in range(len(scenario.machines)):
        if len(scenario.machines) > 1:
            yield _without_machine(scenario, number)
    for number in range(len(scenario.callbacks)):
        smaller = _without_callback(scenario, number)
        if smaller is not None:
            yield smaller
    for place in range(len(scenario.faults)):
        yield evolve(scenario, faults=scenario.faults[:place] + scenario.faults[place + 1 :])
    for place, command in enumerate(scenario.commands):
        rest = scenario.commands[:place], scenario.commands[place + 1 :]
        if command.kind is not CommandKind.STORE:
            yield evolve(scenario, commands=rest[0] + rest[1])
        elif command.is_repeated:
            yield evolve(scenario, commands=(*rest[0], evolve(command, is_repeated=False), *rest[1]))
    for number, callback in enumerate(scenario.callbacks):
        if callback.behaviours and any(number in command.callbacks for command in scenario.commands):
            calmer = evolve(callback, behaviours=callback.behaviours[:-1])
            yield evolve(scenario, callbacks=(*scenario.callbacks[:number], calmer, *scenario.callbacks[number + 1 :]))


def _without_machine(scenario: Scenario, number: int) -> Scenario:
    def moved(fault: Fault) -> Fault:
        return fault if fault.machine < number else evolve(fault, machine=fault.machine - 1)

    return evolve(
        scenario,
        machines=scenario.machines[:number] + scenario.machines[number + 1 :],
        faults=tuple(moved(fault) for fault in scenario.faults if fault.machine != number),
    )


def _without_callback(scenario: Scenario, number: int) -> Scenario | None:
    """The callback keeps its place in the list, so that the others keep their ids; nobody stores it any more."""
    if not any(number in command.callbacks for command in scenario.commands):
        return None
    commands: list[Command] = []
    for command in scenario.commands:
        left = tuple(one for one in command.callbacks if one != number)
        if left or not command.callbacks:
            commands.append(evolve(command, callbacks=left))
    return evolve(scenario, commands=tuple(commands))
