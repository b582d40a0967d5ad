"""The suite is not decoration: a strategy that breaks one rule is caught by that rule."""

import pytest

from fedsim import check

CAUGHT_BY = {
    "undocumented": "says what it is",
    "open_config": "the config is closed and frozen",
    "thawed_config": "the config is closed and frozen",
    "needy_config": "the config has defaults: a name is enough to run",
    "opaque_state": "the state is a value that a checkpoint holds",
    "hidden_state": "resume is bitwise at every round",
    "changes_state": "inputs are not changed",
    "changes_shared": "inputs are not changed",
    "global_torch": "the global generators are left alone",
    "global_python": "the global generators are left alone",
    "deaf_to_the_seed": "equal seeds give equal bits",
    "extra_channel": "exactly the declared channels travel",
    "shares_memory": "exactly the declared channels travel",
    "sees_the_block": "batched = plain in float64 (1e-10)",
    "asks_for_numbers": "batched = plain in float32 (1e-5)",
    "first_come": "the order and size of blocks are irrelevant",
    "order_of_arrival": "the order and size of blocks are irrelevant",
    "hides_nan": "NaN and Inf never reach the state",
    "forgives": "a failing client is named",
    "never_rests": "a failing client is dropped, the others count",
    "climbs": "it learns",
    "no_model": "it learns",
    "logs_text": "what is logged are numbers",
    "scribbles": "clients are evaluated on their own examples",
}


@pytest.mark.parametrize(("mutant", "title"), CAUGHT_BY.items())
def test_mutant_is_caught(mutant: str, title: str) -> None:
    of = check.subject(f"mutants:{mutant}")
    (rule,) = [rule for rule in check.rules(of) if rule.title == title]
    problem = check.verdict(of, rule)
    assert problem is not None
    assert "\n" not in problem
