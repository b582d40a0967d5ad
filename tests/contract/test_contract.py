"""One table that every registered strategy enters by itself: a row a strategy, a column a rule of ``fedsim check``."""

import pytest

from fedsim import check, registry
from fedsim.check import Rule

# Strangers' strategies are held to the rules that make sense for them; one stands here for all (see test_strangers).
NAMES = [*registry.installed("strategies"), "flwr.serverapp.strategy:FedAdam"]
TABLE = [(name, rule) for name in NAMES for rule in check.rules(check.subject(name))]


@pytest.mark.parametrize(("name", "rule"), TABLE, ids=[f"{name}-{rule.title}" for name, rule in TABLE])
def test_rule(name: str, rule: Rule) -> None:
    problem = check.verdict(check.subject(name), rule)
    assert problem is None, problem


def test_every_rule_is_in_the_table() -> None:
    assert {rule.title for _, rule in TABLE} == {rule.title for rule in check.RULES}
