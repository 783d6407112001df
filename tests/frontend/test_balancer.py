"""Load balancing: least loaded first, prefix affinity between equals."""

from __future__ import annotations

from frontend.requests.balancer import AFFINITY_TOKENS, MAX_REMEMBERED_PREFIXES, Balancer

PROMPT = list(range(AFFINITY_TOKENS))


def test_the_engine_with_the_fewest_requests_in_flight_is_chosen() -> None:
    assert Balancer(3).choose([1], [4, 2, 3], [0, 1, 2]) == 1


def test_a_load_that_an_engine_reports_counts_when_it_is_larger() -> None:
    balancer = Balancer(2)
    balancer.report(0, 9)
    assert balancer.choose([1], [0, 5], [0, 1]) == 1
    balancer.report(0, 0)
    assert balancer.choose([1], [0, 5], [0, 1]) == 0


def test_dead_engines_are_not_chosen() -> None:
    assert Balancer(3).choose([1], [0, 0, 9], [2]) == 2


def test_equal_engines_take_turns() -> None:
    balancer = Balancer(3)
    assert [balancer.choose([n], [0, 0, 0], [0, 1, 2]) for n in range(6)] == [0, 1, 2, 0, 1, 2]


def test_among_equals_a_prompt_goes_where_its_beginning_went() -> None:
    balancer = Balancer(3)
    first = balancer.choose([*PROMPT, 1], [0, 0, 0], [0, 1, 2])
    balancer.choose([7], [0, 0, 0], [0, 1, 2])
    assert balancer.choose([*PROMPT, 2], [0, 0, 0], [0, 1, 2]) == first


def test_affinity_never_outweighs_load() -> None:
    balancer = Balancer(2)
    first = balancer.choose(PROMPT, [0, 0], [0, 1])
    loads = [0, 0]
    loads[first] = 1
    assert balancer.choose(PROMPT, loads, [0, 1]) == 1 - first


def test_remembered_prefixes_are_bounded() -> None:
    balancer = Balancer(1)
    for number in range(MAX_REMEMBERED_PREFIXES + 10):
        balancer.choose([number], [0], [0])
    assert len(balancer._engine_by_prefix) == MAX_REMEMBERED_PREFIXES
