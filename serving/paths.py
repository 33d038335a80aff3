"""The paths of the endpoint that more than its interface must know."""

RANK, RANK_BATCH, EVENTS, FEEDBACK = "/v1/rank", "/v1/rank:batch", "/v1/events", "/v1/feedback"
EXPLAIN, CONSOLE, ABOUT = "/v1/explain", "/console", "/v1/console"
MODEL, HEALTH, READY = "/v1/model", "/healthz", "/readyz"

LIMITED = (RANK, RANK_BATCH, EVENTS, FEEDBACK, EXPLAIN)
"""Of these the service holds only so many requests at a time."""

OPEN = (HEALTH, READY, CONSOLE)
"""Anybody may ask these: they tell nothing but whether the service works, and give a page without any data."""
