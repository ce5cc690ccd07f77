"""Random small networks under every preset: forward as eager, gradients as eager within rounding or a codec's error.

hypothesis makes them (random_networks.py) and shrinks what fails; test_found_networks.py has what it found before.
"""

import warnings

from hypothesis import HealthCheck, given, seed, settings, strategies
from properties import PRESETS, violations
from random_networks import networks

COUNT, LONG_COUNT, PARTS = 50, 2000, 20


def pytest_generate_tests(metafunc):
    """`--long` takes 2,000 of them, in parts that several cores can share."""
    metafunc.parametrize("part", range(PARTS if metafunc.config.getoption("--long") else 1))


def test_random_networks_keep_the_invariants(request, part):
    @settings(
        max_examples=LONG_COUNT // PARTS if request.config.getoption("--long") else COUNT,
        deadline=None,
        database=None,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )
    @seed(part)
    @given(networks(), strategies.sampled_from(list(PRESETS)))
    def holds(network, preset):
        assert not violations(network, preset)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        holds()
