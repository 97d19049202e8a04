"""Tells people what happened in a run that broke a promise."""

from __future__ import annotations

from callbackq.testing.history import RULES as RULES_OF_HISTORY
from callbackq.testing.simulation.ledger import RULES as RULES_OF_LEDGER
from callbackq.testing.simulation.run import Report

__all__ = ["story"]

_MOST_LINES = 150
_MOST_VIOLATIONS = 8


def story(report: Report) -> str:
    """
    Write down a scenario, who held which lock when, what was sent and answered, and what went wrong in the world.

    Args:
        report: best of a shrunk run.
    """
    scenario = report.scenario
    broken = [
        f"  {violation.rule} {violation.callback_id}: {violation.detail}"
        for violation in report.violations[:_MOST_VIOLATIONS]
    ]
    stored = sorted({number for command in scenario.commands for number in command.callbacks})
    rules = {**RULES_OF_LEDGER, **RULES_OF_HISTORY}
    promises = [f"  ({rule}: {rules[rule]})" for rule in dict.fromkeys(one.rule for one in report.violations)]
    replay = "python -m callbackq.testing.simulation"
    lines = [entry.line() for entry in report.log]
    if len(lines) > _MOST_LINES:
        left_out = len(lines) - _MOST_LINES
        lines = [*lines[: _MOST_LINES // 2], f"... {left_out} lines ...", *lines[-_MOST_LINES // 2 :]]
    return "\n".join(
        [
            f"seed {scenario.seed} on {scenario.store} broke {len(report.violations)} promises:",
            *broken,
            *promises,
            "dispatchers:",
            *(f"  {machine}" for machine in scenario.machines),
            f"locks: {scenario.lock_timeout:g} s, deadline: {scenario.deadline:g} s",
            "callbacks, and how their receivers behave:",
            *(f"  c{number}: {scenario.callbacks[number]}" for number in stored),
            "what application and operators do:",
            *(f"  {command}" for command in scenario.commands),
            "faults:",
            *(f"  {fault}" for fault in scenario.faults),
            "what happened, by the second:",
            *lines,
            f"replay all that the seed drew: {replay} --start {scenario.seed} --seeds 1 --store {scenario.store}",
        ]
    )
