"""Which replica a request on Ray Serve goes to: the one that it names, as long as that is there, or one with few.

Ray Serve copies this module into its proxy, which has no torch, so it imports nothing of the library.
"""

from __future__ import annotations

import pickle
import random
from typing import Any
from urllib.parse import parse_qs

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

PARAMETER = "replica"  # of the URL, which has the name that the answer to `open` gives


class StickyRouter(RequestRouter):
    """Sends a viewer who comes back to the replica that holds the session, and others to one of two, the one with
    fewer connections (the power of two choices). A replica that is named and gone, or full, is passed over.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Returns the replicas to be tried, group by group."""
        wanted = None if pending_request is None else named_replica(pending_request.args)
        named = [replica for replica in candidate_replicas if replica.replica_id.unique_id == wanted]
        few = random.sample(candidate_replicas, min(2, len(candidate_replicas)))
        return [named, few] if named else [few]


def named_replica(arguments: list[Any]) -> str | None:
    """The replica that a request names in its URL.

    Args:
        arguments: of the request; Ray Serve's proxy, in whose process this runs, has pickled the only one.
    """
    if len(arguments) != 1 or not isinstance(arguments[0], bytes):
        return None
    query: bytes = pickle.loads(arguments[0]).asgi_scope.get("query_string", b"")
    names = parse_qs(query.decode("latin-1")).get(PARAMETER)
    return names[0] if names else None
