"""Redis Cluster: the keys of a script share a hash tag, so one node has them. Which, is asked at each connection.

URL: `redis+cluster://[user:password@]host[:6379],host,...`, any nodes; `rediss+cluster://` is TLS. The client library's
cluster client is not used: it repeats commands by itself, which only their caller may do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from redis.asyncio import Redis
from redis.asyncio.sentinel import MasterNotFoundError
from redis.exceptions import RedisError

from fastworker.stream.keys import slot
from fastworker.stream.places import FoundPool, split

PORT: Final = 6_379
ANSWER_S: Final = 1.0
"""That a node may take to say who has a slot: the next one is asked then."""

Address = tuple[str, int]


class _Nodes:
    """Who has a slot. What it learns of other nodes is kept: those of the URL may be gone one day."""

    def __init__(self, seeds: list[Address], options: dict[str, Any]) -> None:
        self._options = options
        self._nodes = {seed: self._client(seed) for seed in seeds}

    async def discover_master(self, key: str) -> Address:
        """The master that has the key's slot. Raises MasterNotFoundError."""
        wanted = slot(key)
        for asked, client in list(self._nodes.items()):
            try:
                ranges: Any = await client.execute_command("CLUSTER SLOTS")
            except (RedisError, OSError):
                continue
            self._nodes[asked] = self._nodes.pop(asked)  # the others are asked first when it fails
            found = None
            for first, last, *nodes in ranges:
                addresses = [(node[0].decode() or asked[0], int(node[1])) for node in nodes]
                for address in addresses:
                    self._nodes.setdefault(address, self._client(address))
                if first <= wanted <= last:
                    found = addresses[0]
            if found is not None:
                return found
        raise MasterNotFoundError(f"nobody has slot {wanted}")

    async def aclose(self) -> None:
        for client in self._nodes.values():
            await client.aclose()

    def _client(self, address: Address) -> Redis:
        return Redis(host=address[0], port=address[1], **self._options)


class SlotPool(FoundPool):
    """Connections to the node that has one slot. The clients for other slots are closed with them."""

    what = "the node of the cluster that has {}"
    nobody = "no node of the cluster can be reached that says who has it"
    connect: Callable[[str], Redis]
    """A client for the node that has this key."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)  # type: ignore[no-untyped-call]
        self.others: dict[int, Redis] = {}

    async def disconnect(self, inuse_connections: bool = True) -> None:
        await super().disconnect(inuse_connections)
        if inuse_connections:
            for client in self.others.values():
                await client.connection_pool.disconnect()


def node_of(redis: Redis, key: str) -> Redis:
    """The client for the node that has this key: on a Cluster another one for each slot, else always the same."""
    pool = redis.connection_pool
    if not isinstance(pool, SlotPool) or (wanted := slot(key)) == slot(pool.service_name):
        return redis
    if wanted not in pool.others:
        pool.others[wanted] = pool.connect(key)
    return pool.others[wanted]


def slot_pool(url: str, stream_key: str, options: dict[str, Any]) -> SlotPool:
    """Of a URL that urls.redis accepted. `options`: of each connection. ValueError for a bad option of the URL."""
    found = split(url, PORT)
    waits = {"socket_timeout": ANSWER_S, "socket_connect_timeout": ANSWER_S, "retry": options["retry"]}
    nodes = _Nodes(found.hosts, {"protocol": options["protocol"], **found.options, **waits})
    return SlotPool(stream_key, nodes, **{**found.options, **options})
