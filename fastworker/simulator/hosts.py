"""The other half of the simulated network: PDSes, a DID directory and a relay's XRPC, on loopback, with every fault.

They serve the simulator's true trees (`Network(signed=True)`), really signed, as they are at the moment of the
request. A host's fault is set from outside; `times` limits it to so many requests. Nothing here imports the code
under test.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import random
import time
from collections import Counter
from types import TracebackType
from typing import Any, Literal, Self

from aiohttp import web

from fastworker.simulator import mst
from fastworker.simulator.cbor import RAW, cid_of, cid_text
from fastworker.simulator.keys import SigningKey
from fastworker.simulator.repo import Clock, Repo, car_bytes, commit_block, tid, varint
from fastworker.simulator.world import Account, World

Fault = Literal[
    "unavailable",  # 503
    "limited",  # 429 without any header, as a front end sends it: HTML
    "limited_told",  # 429 with ratelimit-* headers
    "limited_retry_after",
    "truncated",  # cut exactly between two blocks, a sound HTTP answer
    "cut",  # the connection ends inside the body
    "bomb",  # a gigabyte of zeros, packed into a megabyte
    "endless",
    "trickle",
    "silent",  # never a first byte
    "redirect_private",
    "redirect_plain",  # from here to another origin's http
    "redirect_loop",
    "wrong_key",
    "other_account",
    "future_rev",
    "rolled_back",  # restored from a backup: an older revision, and half of the records
    "missing_block",
    "changed_block",
    "unordered",
    "duplicates",
    "foreign",
    "commit_meanwhile",  # pages of two different states: nodes of the older one are missing
    "html",
    "brotli",
    "not_found",
    "takendown",
    "suspended",
    "deactivated",
]
_ERRORS = {
    "not_found": "RepoNotFound",
    "takendown": "RepoTakendown",
    "suspended": "RepoSuspended",
    "deactivated": "RepoDeactivated",
}
PAGE = 1_000


class _Server:
    def __init__(self) -> None:
        self.app = web.Application()
        self.url = ""
        self.asked: list[tuple[float, str]] = []  # when (monotonic), path
        self.hold: asyncio.Event | None = None  # requests wait for it
        self.status: int | None = None  # instead of every answer, once they do not wait
        self._runner = web.AppRunner(self.app, shutdown_timeout=0.1)

    async def start(self) -> None:
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        await self._runner.cleanup()

    def route(self, path: str, handler: Any) -> None:
        async def handle(request: web.Request) -> web.StreamResponse:
            self.asked.append((time.monotonic(), request.path))
            if self.hold is not None:
                await self.hold.wait()
            if self.status is not None:
                return web.Response(status=self.status)
            answer: web.StreamResponse = await handler(request)
            return answer

        self.app.router.add_get(path, handle)

    def most_in(self, seconds: float) -> int:
        """Most requests that came within so many seconds."""
        times = [at for at, _ in self.asked]
        return max((sum(start <= at < start + seconds for at in times) for start in times), default=0)


class SimPds(_Server):
    def __init__(self, accounts: dict[str, Account], *, packed: bool) -> None:
        super().__init__()
        self.accounts = accounts
        self.fault: Fault | None = None
        self.times: int | None = None
        self.tokens: float | None = None  # requests that are still answered; then 429 with headers
        self.window_s = 300.0
        self._packed = packed
        self.route("/xrpc/com.atproto.sync.getRepo", self._get_repo)
        self.route("/xrpc/com.atproto.sync.getRecord", self._get_record)
        self.route("/xrpc/com.atproto.sync.getRepoStatus", self._status)
        self.route("/xrpc/com.atproto.sync.listRepos", self._list_repos)

    def fail(self, fault: Fault | None, times: int | None = None) -> None:
        self.fault, self.times = fault, times

    def _next_fault(self) -> Fault | None:
        if self.times is not None:
            self.times -= 1
            if self.times < 0:
                self.fault, self.times = None, None
        return self.fault

    def _limits(self) -> dict[str, str]:
        if self.tokens is None:
            return {}
        self.tokens -= 1
        return {
            "ratelimit-limit": "3000",
            "ratelimit-remaining": str(max(0, int(self.tokens))),
            "ratelimit-reset": str(int(time.time() + self.window_s)),
            "ratelimit-policy": f"3000;w={self.window_s:.0f}",
        }

    async def _get_repo(self, request: web.Request) -> web.StreamResponse:
        fault = self._next_fault()
        limits = self._limits()
        account = self.accounts.get(request.query.get("did", ""))
        if account is None:
            fault = "not_found"
        if fault is not None and (answer := await self._instead(request, fault)) is not None:
            return answer
        assert account is not None
        car = repository(account, fault)
        headers = {"content-type": "application/vnd.ipld.car", **limits}
        if self._packed:
            headers["content-encoding"] = "gzip"
            car = gzip.compress(car, 1)
        if fault == "brotli":
            headers["content-encoding"] = "br"
        if fault == "cut":
            response = web.StreamResponse(headers={**headers, "content-length": str(len(car))})
            await response.prepare(request)
            await response.write(car[: len(car) // 2])
            assert request.transport is not None
            request.transport.close()
            return response
        return web.Response(body=car, headers=headers)

    async def _instead(self, request: web.Request, fault: Fault) -> web.StreamResponse | None:
        """An answer that is no repository, None where the fault is in the repository itself."""
        if fault in _ERRORS:
            return web.json_response({"error": _ERRORS[fault], "message": "as it was told"}, status=400)
        match fault:
            case "unavailable":
                return web.Response(status=503, text="<html>busy</html>")
            case "limited":
                return web.Response(status=429, text="<html>slow down</html>", content_type="text/html")
            case "limited_told":
                reset = str(int(time.time() + self.window_s))
                return web.Response(status=429, headers={"ratelimit-remaining": "0", "ratelimit-reset": reset})
            case "limited_retry_after":
                return web.Response(status=429, headers={"retry-after": "1"})
            case "html":
                return web.Response(text="<html>not a repository</html>", content_type="text/html")
            case "redirect_private":
                raise web.HTTPFound("http://127.0.0.1:9/latest/meta-data")
            case "redirect_plain":
                raise web.HTTPFound("http://example.com/xrpc/com.atproto.sync.getRepo")
            case "redirect_loop":
                raise web.HTTPFound(request.path_qs)
            case "bomb":
                zeros = gzip.compress(bytes(1 << 24), 9) * 64
                return web.Response(body=zeros, headers={"content-encoding": "gzip"})
            case "silent":
                await asyncio.sleep(60)
            case "endless" | "trickle":
                return await _without_end(request, fault)
        return None

    async def _get_record(self, request: web.Request) -> web.StreamResponse:
        account = self.accounts.get(request.query.get("did", ""))
        if account is None:
            return web.json_response({"error": "RepoNotFound"}, status=400)
        path = f"{request.query.get('collection')}/{request.query.get('rkey')}".encode()
        commit_cid, commit = head_of(account)
        _, blocks = mst.blocks(account.repo.root, [path])
        record = mst.get(account.repo.root, path)
        if record is not None:
            blocks[record] = account.repo.records[record]
        return web.Response(body=car_bytes(commit_cid, {commit_cid: commit, **blocks}))

    async def _status(self, request: web.Request) -> web.StreamResponse:
        account = self.accounts.get(request.query.get("did", ""))
        if account is None:
            return web.json_response({"error": "RepoNotFound"}, status=400)
        head_of(account)
        told = {"active": True} if account.status is None else {"active": False, "status": account.status}
        return web.json_response({"did": account.did, "rev": account.repo.rev, **told})

    async def _list_repos(self, request: web.Request) -> web.StreamResponse:
        return web.json_response(_page(request, "repos", [_listed(one) for one in self.accounts.values()]))


class SimHosts:
    """An async context manager: `count` PDSes, the directory, the relay. Accounts that appear later get a PDS, too."""

    def __init__(self, world: World, *, count: int = 3, packed: bool = True) -> None:
        self._world = world
        self.pdses = [SimPds({}, packed=packed) for _ in range(count)]
        self._by_did: dict[str, Account] = {}
        self.directory = _Server()
        self.relay = _Server()
        self.moved: dict[str, int] = {}  # DID -> number of its PDS
        self.keys: dict[str, str] = {}  # DID -> the multikey that its document shows
        self.statuses: dict[str, str | None] = {}  # DID -> what the relay's list says; None: active; empty: nothing
        self.documents: dict[str, dict[str, Any] | int] = {}  # what the directory says instead
        self.directory.route("/export", self._export)
        self.directory.route("/{did}", self._document)
        self.relay.route("/xrpc/com.atproto.sync.listHosts", self._list_hosts)
        self.relay.route("/xrpc/com.atproto.sync.listRepos", self._list_repos)
        self.relay.route("/xrpc/com.atproto.sync.listReposByCollection", self._by_collection)
        self.relay.route("/xrpc/com.atproto.sync.getRepo", self._to_pds)
        self.relay.route("/xrpc/com.atproto.sync.getRecord", self._to_pds)
        self.relay.route("/xrpc/com.atproto.sync.getRepoStatus", self._to_pds)

    async def __aenter__(self) -> Self:
        for server in (*self.pdses, self.directory, self.relay):
            await server.start()
        self.settle()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for server in (*self.pdses, self.directory, self.relay):
            await server.stop()

    @property
    def own(self) -> frozenset[str]:
        """The origins of these servers."""
        return frozenset(server.url for server in (*self.pdses, self.directory, self.relay))

    @property
    def counts(self) -> Counter[str]:
        """Requests by path, at all servers."""
        return Counter(path for server in (*self.pdses, self.directory, self.relay) for _, path in server.asked)

    def settle(self) -> None:
        """Every account at its PDS."""
        for pds in self.pdses:
            pds.accounts.clear()
        for account in self._world.accounts():
            self.pds(account).accounts[account.did] = self._by_did[account.did] = account

    def pds(self, account: Account) -> SimPds:
        return self.pdses[self.moved.get(account.did, account.number % len(self.pdses))]

    def rotate(self, account: Account) -> None:
        """The account signs with another key from now on, and its document says so."""
        account.key = account.repo.key = SigningKey(f"rotated {account.did}", "p256")

    def document(self, account: Account) -> dict[str, Any]:
        assert account.key is not None
        return {
            "@context": ["https://www.w3.org/ns/did/v1"],
            "id": account.did,
            "alsoKnownAs": [f"at://{account.handle}"],
            "verificationMethod": [
                {
                    "id": f"{account.did}#atproto",
                    "type": "Multikey",
                    "controller": account.did,
                    "publicKeyMultibase": self.keys.get(account.did, account.key.multikey),
                }
            ],
            "service": [
                {
                    "id": "#atproto_pds",
                    "type": "AtprotoPersonalDataServer",
                    "serviceEndpoint": self.pds(account).url,
                }
            ],
        }

    def _account(self, did: str) -> Account | None:
        found = self._by_did.get(did)
        return found or next((account for account in self._world.accounts() if account.did == did), None)

    async def _document(self, request: web.Request) -> web.StreamResponse:
        did = request.match_info["did"]
        account = self._account(did)
        found: dict[str, Any] | int = 404 if account is None else self.document(account)
        found = self.documents.get(did, found)
        return web.Response(status=found) if isinstance(found, int) else web.json_response(found)

    async def _export(self, request: web.Request) -> web.Response:
        """The directory's log of operations, one JSON object a line."""
        after, count = request.query.get("after", ""), int(request.query.get("count", "10"))
        lines = [
            {"did": did, "createdAt": at, "operation": {"type": "plc_operation", "alsoKnownAs": [f"at://{handle}"]}}
            for at, did, handle in self._world.operations
            if at > after
        ]
        return web.Response(text="".join(f"{json.dumps(line)}\n" for line in lines[:count]))

    async def _list_hosts(self, request: web.Request) -> web.StreamResponse:
        hosts = [
            {"hostname": pds.url.removeprefix("http://"), "accountCount": len(pds.accounts), "status": "active"}
            for pds in self.pdses
        ]
        return web.json_response(_page(request, "hosts", hosts))

    async def _list_repos(self, request: web.Request) -> web.StreamResponse:
        told = [{**_listed(one), **self._said(one.did)} for one in self._world.accounts()]
        return web.json_response(_page(request, "repos", told))

    def _said(self, did: str) -> dict[str, Any]:
        account = self._account(did)
        assert account is not None
        status = self.statuses.get(did, account.status)
        if status == "":
            return {}
        return {"active": True} if status is None else {"active": False, "status": status}

    async def _by_collection(self, request: web.Request) -> web.StreamResponse:
        start = f"{request.query.get('collection')}/".encode()
        held = [
            {"did": one.did}
            for one in self._world.accounts()
            if any(key.startswith(start) for key, _ in mst.items(one.repo.root))
        ]
        return web.json_response(_page(request, "repos", held))

    async def _to_pds(self, request: web.Request) -> web.StreamResponse:
        account = self._account(request.query.get("did", ""))
        if account is None:
            return web.json_response({"error": "RepoNotFound"}, status=400)
        raise web.HTTPFound(self.pds(account).url + request.path_qs)


def head_of(account: Account) -> tuple[bytes, bytes]:
    """(CID, block) of the account's newest commit."""
    cid, blocks = account.repo.export()
    return cid, blocks[cid]


def repository(account: Account, fault: Fault | None = None) -> bytes:
    """The CAR of `getRepo`, with a fault that is in it."""
    repo = _rolled_back(account) if fault == "rolled_back" else account.repo
    root, blocks = repo.export()
    data = mst.seal(repo.root)
    if fault in ("wrong_key", "other_account", "future_rev"):
        key, did, rev = repo.key, repo.did, repo.rev or ""
        if fault == "wrong_key":
            key = SigningKey("a stranger")
        elif fault == "other_account":
            did = "did:plc:" + "z" * 24
        else:
            rev = tid(int((time.time() + 86_400) * 1e6))
        del blocks[root]
        commit = commit_block(did, rev, data, key)
        root = cid_of(commit)
        blocks = {root: commit, **blocks}
    sections = list(blocks.items())
    match fault:
        case "truncated":
            sections = sections[: len(sections) // 2]
        case "missing_block":
            sections = [one for one in sections if one[0] != data]
        case "commit_meanwhile":
            sections = _pages(account)
        case "changed_block":
            cid, block = sections[-1]
            sections[-1] = (cid, block[:-1] + bytes((block[-1] ^ 1,)))
        case "unordered":
            random.Random(1).shuffle(sections)
        case "duplicates":
            sections += sections
        case "foreign":
            sections = [(cid_of(b"of another"), b"of another"), (RAW + bytes(32), b"a blob"), *sections]
    return car_bytes(root, {}) + b"".join(varint(len(cid) + len(block)) + cid + block for cid, block in sections)


def _rolled_back(account: Account) -> Repo:
    repo = Repo(account.did, Clock(), root=account.repo.root, key=account.repo.key)
    repo.records = dict(account.repo.records)
    paths = [key.decode() for key, _ in mst.items(repo.root)]
    repo.commit([("delete", path, None) for path in paths[len(paths) // 2 :][:200]])
    return repo


def _pages(account: Account) -> list[tuple[bytes, bytes]]:
    """The first half before a commit, the second after it, as a host reads pages that nothing holds together."""
    before = list(account.repo.export()[1].items())
    repo = Repo(account.did, Clock(), root=account.repo.root, key=account.repo.key)
    repo.records = dict(account.repo.records)
    paths = [key.decode() for key, _ in mst.items(repo.root)][: max(1, len(before) // 3)]
    repo.commit([("delete", path, None) for path in paths])
    after = repo.export()[1]
    half = before[: len(before) // 2]
    return half + [one for one in after.items() if one not in half]


def _listed(account: Account) -> dict[str, Any]:
    cid, _ = head_of(account)
    return {"did": account.did, "head": cid_text(cid), "rev": account.repo.rev}


def _page(request: web.Request, name: str, everything: list[dict[str, Any]]) -> dict[str, Any]:
    start = int(request.query.get("cursor", "0"))
    size = min(PAGE, int(request.query.get("limit", "500")))
    page: dict[str, Any] = {name: everything[start : start + size]}
    if start + size < len(everything):
        page["cursor"] = str(start + size)
    return page


async def _without_end(request: web.Request, fault: Fault) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    piece, pause = (bytes(1 << 16), 0.0) if fault == "endless" else (b"\0", 0.02)
    while True:
        await response.write(piece)
        await asyncio.sleep(pause)
