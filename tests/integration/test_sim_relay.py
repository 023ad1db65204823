"""The relay's cursor rules and misfortunes, seen by a client on a real socket."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import libipld
import pytest

from fastworker.simulator.network import Network
from fastworker.simulator.relay import PATH, Fault, SimRelay
from fastworker.simulator.repo import START_SEQ


@asynccontextmanager
async def listening(relay: SimRelay, cursor: int | None = None) -> Any:
    query = "" if cursor is None else f"?cursor={cursor}"
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(relay.url + PATH + query, max_msg_size=6_000_000, heartbeat=30) as socket,
    ):
        yield socket


async def take(socket: Any, count: int) -> list[dict[str, Any]]:
    """Headers and payloads as one dict each."""
    found = []
    for _ in range(count):
        message = await asyncio.wait_for(socket.receive(), 30)
        assert message.type is aiohttp.WSMsgType.BINARY, message
        header, payload = libipld.decode_dag_cbor_multi(message.data)
        found.append(header | payload)
    return found


async def ending(socket: Any) -> aiohttp.WSMsgType:
    message: aiohttp.WSMessage = await asyncio.wait_for(socket.receive(), 30)
    return message.type


def network(count: int) -> list[Any]:
    return list(Network(7, accounts=50).frames(count))


async def test_the_first_client_without_a_cursor_gets_a_finite_run_whole_and_then_silence() -> None:
    frames = network(500)
    async with SimRelay(frames) as relay, listening(relay) as socket:
        assert [m["seq"] for m in await take(socket, 500)] == [f.seq for f in frames]
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(socket.receive(), 0.1)
        assert relay.sent == 500
        assert relay.exhausted


async def test_bytes_arrive_unchanged() -> None:
    frames = network(20)
    async with SimRelay(frames) as relay, listening(relay) as socket:
        for frame in frames:
            assert (await socket.receive()).data == frame.data


async def test_a_client_without_a_cursor_starts_at_the_live_tip() -> None:
    frames = network(30)
    async with SimRelay(frames[:20]) as relay:
        async with listening(relay) as first:
            await take(first, 20)
        async with listening(relay) as second:
            await relay.connected()
            relay.emit(*frames[20:])
            assert (await take(second, 10))[0]["seq"] == frames[20].seq


async def test_start_oldest_gives_the_whole_window_to_a_client_without_a_cursor() -> None:
    frames = network(20)
    async with SimRelay((), start="oldest") as relay:
        relay.emit(*frames)
        async with listening(relay) as socket:
            assert [m["seq"] for m in await take(socket, 20)] == [f.seq for f in frames]


async def test_replay_is_inclusive() -> None:
    frames = network(20)
    async with SimRelay(()) as relay:
        relay.emit(*frames)
        async with listening(relay, frames[12].seq) as socket:
            assert [m["seq"] for m in await take(socket, 8)] == [f.seq for f in frames[12:]]
        async with listening(relay, frames[-1].seq) as socket:
            assert [m["seq"] for m in await take(socket, 1)] == [frames[-1].seq]


async def test_a_cursor_in_a_gap_of_seq_starts_after_the_gap() -> None:
    frames = network(9)
    del frames[3:6]
    async with SimRelay(()) as relay:
        relay.emit(*frames)
        async with listening(relay, START_SEQ + 4) as socket:
            assert (await take(socket, 1))[0]["seq"] == START_SEQ + 6


async def test_cursor_zero_gives_the_whole_window_without_a_word() -> None:
    frames = network(30)
    async with SimRelay((), window=10) as relay:
        relay.emit(*frames)
        async with listening(relay, 0) as socket:
            assert [m["seq"] for m in await take(socket, 10)] == [f.seq for f in frames[-10:]]


async def test_what_is_kept_is_the_window_and_a_quarter_more() -> None:
    async with SimRelay((), window=100) as relay:
        for frame in network(1_000):
            relay.emit(frame)
            assert len(relay._frames) <= 125


async def test_an_old_cursor_is_told_so_and_gets_the_whole_window() -> None:
    frames = network(30)
    async with SimRelay((), window=10) as relay:
        relay.emit(*frames)
        async with listening(relay, frames[5].seq) as socket:
            info, *rest = await take(socket, 11)
            assert (info["t"], info["name"]) == ("#info", "OutdatedCursor")
            assert [m["seq"] for m in rest] == [f.seq for f in frames[-10:]]


async def test_a_future_cursor_is_an_error_frame_and_the_end() -> None:
    frames = network(5)
    async with SimRelay(()) as relay:
        relay.emit(*frames)
        async with listening(relay, frames[-1].seq + 1) as socket:
            assert (await take(socket, 1))[0] | {"message": ""} == {"op": -1, "error": "FutureCursor", "message": ""}
            assert await ending(socket) is aiohttp.WSMsgType.CLOSE


async def test_a_relay_that_was_started_again_still_has_its_deterministic_history() -> None:
    frames = network(60)
    async with SimRelay(Network(7, accounts=50).frames(60), start="oldest") as relay:
        async with listening(relay, frames[40].seq) as socket:
            assert [m["seq"] for m in await take(socket, 20)] == [f.seq for f in frames[40:]]
        async with listening(relay, frames[-1].seq + 1) as socket:
            assert (await take(socket, 1))[0]["error"] == "FutureCursor"


async def test_every_client_gets_every_frame() -> None:
    frames = network(200)
    async with SimRelay((), start="oldest") as relay:
        relay.emit(*frames)
        async with listening(relay) as one, listening(relay) as two:
            for socket in (one, two):
                assert [m["seq"] for m in await take(socket, 200)] == [f.seq for f in frames]


async def test_a_client_that_falls_out_of_the_window_is_too_slow() -> None:
    big = b"\xff" * 400_000  # no seq: kept by place
    async with SimRelay(()) as relay, listening(relay) as socket:
        await relay.connected()
        relay._window = 2
        for _ in range(200):
            relay.emit(big)
            await asyncio.sleep(0)
        last = b""
        while (message := await asyncio.wait_for(socket.receive(), 30)).type is aiohttp.WSMsgType.BINARY:
            last = message.data
        assert libipld.decode_dag_cbor_multi(last)[1]["error"] == "ConsumerTooSlow"


async def test_rate_is_kept_without_a_listener_and_within_a_tenth() -> None:
    loop = asyncio.get_running_loop()
    frames = network(1_000)  # made before: how fast they are made is another question
    async with SimRelay(frames, rate=1_000, start="oldest") as relay:
        started = loop.time()
        async with listening(relay, 0) as socket:
            await take(socket, 500)
        assert 0.45 < loop.time() - started < 5  # a loaded machine is late; all at the pace of sleeps would be more


async def test_a_relay_that_waits_for_its_client_shows_it_the_first_frame() -> None:
    frames = network(50)
    async with SimRelay(frames, rate=5_000, wait_for_client=True) as relay:
        await asyncio.sleep(0.05)
        assert relay.head is None
        async with listening(relay) as socket:
            assert (await take(socket, 50))[0]["seq"] == frames[0].seq


@pytest.mark.parametrize("then", ["drop", "torn"])
async def test_a_broken_connection_after_some_frames(then: Any) -> None:
    frames = network(10)
    async with SimRelay((), start="oldest") as relay:
        relay.emit(*frames)
        relay.faults.append(Fault(frames=4, then=then))
        async with listening(relay) as socket:
            assert len(await take(socket, 4)) == 4
            assert await ending(socket) in {aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.ERROR, aiohttp.WSMsgType.CLOSE}
        async with listening(relay, frames[3].seq) as socket:
            assert [m["seq"] for m in await take(socket, 7)] == [f.seq for f in frames[3:]]


async def test_consumer_too_slow_close_and_silence_by_order() -> None:
    frames = network(3)
    async with SimRelay((), start="oldest") as relay:
        relay.emit(*frames)
        relay.faults.extend((Fault(frames=1, then="too_slow"), Fault(frames=0, then="close"), Fault(then="silence")))
        async with listening(relay) as socket:
            assert (await take(socket, 2))[1]["error"] == "ConsumerTooSlow"
        async with listening(relay) as socket:
            assert await ending(socket) is aiohttp.WSMsgType.CLOSE
        async with listening(relay) as socket:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(socket.receive(), 0.1)


@pytest.mark.parametrize("status", [429, 500, 501, 502])
async def test_refusals_carry_their_headers_and_end(status: Any) -> None:
    async with SimRelay(network(1)) as relay:
        relay.faults.append(Fault(status=status, headers={"Retry-After": "7"}))
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            async with listening(relay):
                pass
        assert refused.value.status == status
        assert refused.value.headers is not None
        assert refused.value.headers["Retry-After"] == "7"
        async with listening(relay) as socket:
            assert len(await take(socket, 1)) == 1
        assert relay.connections == 1


async def test_redirects_lead_to_another_relay() -> None:
    async with SimRelay(network(1)) as there, SimRelay(()) as here:
        here.faults.append(Fault(status=302, headers={"Location": there.url.replace("ws", "http") + PATH}))
        async with listening(here) as socket:
            assert len(await take(socket, 1)) == 1


async def test_pause_text_and_oversized_messages() -> None:
    async with SimRelay(()) as relay, listening(relay) as socket:
        await relay.connected()
        relay.pause()
        relay.emit("not for you", b"\xff" * 5_500_000)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(socket.receive(), 0.1)
        relay.resume()
        assert (await socket.receive()).data == "not for you"
        assert len((await socket.receive()).data) == 5_500_000


async def test_a_cursor_that_is_no_number_is_refused() -> None:
    async with SimRelay(()) as relay, aiohttp.ClientSession() as session:
        response = await session.get(relay.url.replace("ws", "http") + PATH + "?cursor=abc")
        assert response.status == 400


async def test_leaving_closes_the_sockets_at_once() -> None:
    loop = asyncio.get_running_loop()
    async with aiohttp.ClientSession() as session:
        async with SimRelay(network(5)) as relay:
            socket = await session.ws_connect(relay.url + PATH)
            await take(socket, 5)
            started = loop.time()
            closing = asyncio.create_task(socket.receive())
        assert loop.time() - started < 20  # not the minute that aiohttp would wait
        assert (await closing).type in {aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED}
        await socket.close()
