"""The Ray Serve application: :class:`~serving.service.RankingService` before :class:`~serving.ranker.Ranker`."""

from __future__ import annotations

from ray import serve

from serving.ranker import Ranker
from serving.service import RankingService
from serving.settings import ServingSettings

APPLICATION = "corank"

BY_USER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
"""Sends a user's requests to the ranker that remembers them; where it is full or gone, to the next one on its ring."""


PATIENT_THREADS = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Between two products a model's threads sleep. By default they spin, on the CPUs that the service needs: two cores
then answer a third fewer requests of 32 clients."""


def build_application(settings: ServingSettings) -> serve.Application:
    """The application of these settings, for ``serve.run``."""
    ranker = serve.deployment(
        # The service limits the requests; the ranker must take all of them, or they could not be merged.
        max_ongoing_requests=settings.options.admitted * settings.options.service_replicas,
        num_replicas=settings.options.ranker_replicas,
        ray_actor_options={"num_cpus": settings.ranker_cpus, "runtime_env": {"env_vars": dict(PATIENT_THREADS)}},
        max_constructor_retry_count=2,
        request_router_config={"request_router_class": BY_USER} if settings.by_user else {},
    )(Ranker)
    service = serve.deployment(
        # Room above what the proxy passes on of its three paths, for health and the like; what exceeds the service's
        # own limits reaches it and is answered 503 in JSON.
        max_ongoing_requests=3 * settings.options.admitted + 100,
        num_replicas=settings.options.service_replicas,
        ray_actor_options={"num_cpus": settings.service_cpus},
        max_constructor_retry_count=2,
    )(serve.ingress()(RankingService))
    return service.bind(settings, ranker.bind(settings))
