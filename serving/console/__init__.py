"""The page at ``/console``: a user's history as the model sees it, a ranking, and what it attends to."""

from serving.console.history import Console

__all__ = ["Console"]
