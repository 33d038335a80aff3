"""Several rankers behind one service, on Ray Serve."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from serving.client import RankingClient
from serving.deploy import start, stop
from serving.settings import ServingConfig, ServingSettings
from tests.servers import free_port
from tests.serving.worlds import CONTEXT, NOW

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]


@pytest.mark.parametrize("rankers", [1, 2])
def test_a_users_requests_meet_the_ranker_that_remembers_them(
    settings: ServingSettings, local_ray: None, rankers: int
) -> None:
    options = ServingConfig(ranker_replicas=rankers, memo_megabytes=16)
    some = replace(settings, options=options, ranker_cpus=0.1)
    users = [(f"user {number}", [1, 2, 3], CONTEXT, NOW + number) for number in range(12)]
    try:
        with RankingClient(start(some, port=free_port())) as client:
            first = [client.rank(*user) for user in users]
            assert {answer["memo"] for answer in first} <= {"none", "timeline"}
            for user, before in zip(users * 3, first * 3, strict=True):
                answer = client.rank(*user)
                assert answer["memo"] == "user"
                np.testing.assert_allclose(answer["scores"]["click"], before["scores"]["click"], atol=1e-6)
    finally:
        stop()
