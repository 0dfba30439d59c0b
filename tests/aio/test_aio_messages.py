"""Messages between coroutines: whole, in order, with back-pressure that is awaited, and none lost to a cancellation."""

from __future__ import annotations

import asyncio
import os
import threading
from typing import Any

import pytest

from amst_core import aio
from amst_core.errors import BrokenError, CancelledError, ClosedError, DeadlineError, UsageError
from amst_core.session.tickets import Ticket as SessionTicket

pytestmark = pytest.mark.needs_transport

MIB = 1 << 20


@pytest.mark.parametrize("size", [0, 1, 65537, 5 * MIB + 17])
def test_a_message_arrives_as_it_was_sent_in_both_directions(run: Any, net: Any, size: int) -> None:
    async def main() -> None:
        data = os.urandom(size)
        async with net.pair() as pair:
            for here, there in ((pair.near, pair.far), (pair.far, pair.near)):
                ticket = await here.send(data)
                got = await there.recv()
                assert isinstance(got, memoryview) and got == data
                await ticket
                assert ticket.done and ticket.error is None and ticket.acknowledged == ticket.size == size

    run(main())


def test_no_thread_waits_on_behalf_of_a_coroutine(run: Any, net: Any, until: Any) -> None:
    async def main() -> None:
        async with net.pair() as pair:
            await asyncio.sleep(0.05)  # what opened the streams ends
            before = threading.active_count()
            waiting = [asyncio.create_task(pair.far.recv(f"c{n}")) for n in range(200)]
            waiting.append(asyncio.create_task(pair.near.wait_closed()))
            waiting.append(asyncio.create_task(pair.server.accept()))
            await asyncio.sleep(0.05)
            assert threading.active_count() <= before
            assert not any(task.done() for task in waiting)
            for n in range(200):
                await pair.near.send(b"%d" % n, channel=f"c{n}")
            assert [bytes(m) for m in await asyncio.gather(*waiting[:200])] == [b"%d" % n for n in range(200)]
            for task in waiting[200:]:
                task.cancel()
            await asyncio.wait(waiting[200:])

    run(main())


def test_messages_of_a_channel_arrive_in_the_order_of_the_calls_also_where_they_wait_for_room(
    run: Any, net: Any, until: Any
) -> None:
    async def main() -> None:
        async with net.pair(limits__open_transfers=16) as pair:
            count = 100
            pair.near.limit_rate(16 << 10)
            bodies = [b"%4d" % n * 5_000 for n in range(count)]
            senders = [asyncio.create_task(pair.near.send(body, channel="c")) for body in bodies]
            await until(lambda: any(task.done() for task in senders), "the first to be queued")
            assert not all(task.done() for task in senders), "nothing holds the senders up: the test tests nothing"
            pair.near.limit_rate(None)
            assert [bytes(await pair.far.recv("c")) for _ in range(count)] == bodies
            for task in senders:
                await (await task)

    run(main())


def test_back_pressure_is_awaited_and_holds_up_nobody_else(run: Any, net: Any, until: Any) -> None:
    async def main() -> None:
        async with net.pair(limits__memory="32MiB") as pair:
            sent = 0

            async def flood() -> None:
                nonlocal sent
                for n in range(200):
                    await pair.near.send(bytearray(b"%3d" % n) * 100_000, channel="flood")
                    sent += 1

            flooding = asyncio.create_task(flood())
            await until(lambda: sent, "the first")
            seen = -1
            while seen != sent:  # until it stands still
                seen = sent
                await asyncio.sleep(0.3)
            assert not flooding.done() and sent < 150
            # the loop turns, other channels and the other direction work
            for n in range(20):
                await (await pair.near.send(b"other", channel=f"other{n}"))
                assert await pair.far.recv(f"other{n}") == b"other"
                await (await pair.far.send(b"back"))
                assert await pair.near.recv() == b"back"
            assert pair.server.memory_in_use <= 32 * MIB
            for n in range(200):
                message = await pair.far.recv("flood")
                assert message == b"%3d" % n * 100_000
                del message
            await flooding

    run(main())


def test_a_sender_that_is_cancelled_while_it_waits_for_room_has_sent_nothing(run: Any, net: Any, until: Any) -> None:
    async def main() -> None:
        async with net.pair(limits__open_transfers=8) as pair:
            pair.near.limit_rate(16 << 10)
            queued = 0
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    while True:
                        await pair.near.send(b"%d" % queued * 300_000)
                        queued += 1
            assert 0 < queued < 8
            pair.near.limit_rate(None)
            core = pair.near._inner.core
            assert not core.room._watchers, "a sender that is gone is still to be told of room"
            task = asyncio.create_task(pair.near.send(b"last"))
            got = [bytes(await pair.far.recv()) for _ in range(queued + 1)]
            assert got == [*(b"%d" % n * 300_000 for n in range(queued)), b"last"]
            await (await task)

    run(main())


def test_what_is_mutable_is_copied_before_send_returns(run: Any, net: Any) -> None:
    async def main() -> None:
        async with net.pair() as pair:
            frame = bytearray(b"a" * 3 * MIB)
            ticket = await pair.near.send(frame)
            frame[:] = b"b" * 3 * MIB
            assert await pair.far.recv() == b"a" * 3 * MIB
            await ticket
            borrowed = await pair.near.send(frame, borrow=True)
            assert await pair.far.recv() == b"b" * 3 * MIB
            await borrowed
            assert pair.near._inner.core.memory.copied == 0

    run(main())


def test_where_there_is_no_memory_for_a_copy_the_data_is_sent_as_it_is_and_send_waits(
    run: Any, net: Any, monkeypatch: Any
) -> None:
    async def main() -> None:
        async with net.pair() as pair:
            core = pair.near._inner.core
            monkeypatch.setattr(core, "reserve_copy", lambda size, when_room: False)
            data = bytearray(os.urandom(2 * MIB))
            sending = asyncio.create_task(pair.near.send(data))
            got = await pair.far.recv()
            assert got == data
            assert (await sending).done

            # cancelled, so is the message
            core.limit_rate(16 << 10)
            sending = asyncio.create_task(pair.near.send(data))
            while not core.unfinished():
                await asyncio.sleep(0)
            (ticket,) = core.unfinished()
            sending.cancel()
            with pytest.raises(asyncio.CancelledError):
                await sending
            assert ticket.done and isinstance(ticket.error, CancelledError)
            core.limit_rate(None)

    run(main())


def test_a_cancelled_send_of_borrowed_data_ends_when_no_stream_reads_it_any_more(run: Any, steps: Any) -> None:
    async def main() -> None:
        let_go = threading.Timer(0.1, lambda: inner.complete(CancelledError("the sender cancelled the transfer")))
        inner = SessionTicket(5, cancel=lambda _: let_go.start())
        sending = asyncio.create_task(aio.Ticket(inner).release())
        await steps(2)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        assert inner.done

    run(main())


def test_too_long_a_message_and_an_odd_channel_are_refused(run: Any, net: Any) -> None:
    async def main() -> None:
        async with net.pair(limits__max_message="1MiB") as pair:
            with pytest.raises(UsageError, match=r"limits\.max_message"):
                await pair.near.send(bytes(MIB + 1))
            with pytest.raises(UsageError, match="channel"):
                await pair.near.send(b"", channel="\ud800")

    run(main())


def test_recv_has_a_deadline_of_its_own_and_takes_that_of_asyncio(run: Any, net: Any) -> None:
    async def main() -> None:
        async with net.pair() as pair:
            with pytest.raises(DeadlineError, match="no message on channel 'c'"):
                await pair.far.recv("c", timeout=0.01)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await pair.far.recv("c")
            await (await pair.near.send(b"x", channel="c"))
            assert await pair.far.recv("c", timeout=0) == b"x"
            assert not pair.far._inner.core.inbox._watchers

    run(main())


def test_receivers_that_are_cancelled_at_any_moment_lose_no_message(run: Any, net: Any, steps: Any) -> None:
    """Five receivers of one channel are cancelled over and over, after every number of turns of the loop."""

    async def main() -> None:
        async with net.pair() as pair:
            count = 400
            got: list[int] = []

            async def receive() -> None:
                while True:
                    message = await pair.far.recv()
                    got.append(int(bytes(message)))

            async def send() -> None:
                for n in range(count):
                    await pair.near.send(b"%d" % n)
                    await asyncio.sleep(0.001 if n % 3 == 0 else 0)

            sending = asyncio.create_task(send())
            rounds = 0
            while len(got) < count:
                receivers = [asyncio.create_task(receive()) for _ in range(5)]
                await steps(rounds % 23)
                if rounds % 7 == 0:
                    await asyncio.sleep(0.001)
                for task in receivers:
                    task.cancel()
                await asyncio.wait(receivers)
                rounds += 1
            await sending
            assert got == list(range(count)) and rounds > 20

    run(main())


def test_a_message_goes_to_the_next_receiver_when_the_first_is_cancelled_as_it_comes(
    run: Any, net: Any, steps: Any
) -> None:
    async def main() -> None:
        async with net.pair() as pair:
            inbox = pair.far._inner.core.inbox
            first, second = (asyncio.create_task(pair.far.recv()) for _ in range(2))
            await steps(3)
            assert len(inbox._watchers[""]) == 2
            ticket = await pair.near.send(b"x")
            while len(inbox._watchers[""]) == 2:  # without letting the loop turn: the first has been called
                pass
            first.cancel()
            assert await second == b"x"
            with pytest.raises(asyncio.CancelledError):
                await first
            await ticket

    run(main())


def test_messages_end_when_either_side_closes_and_raise_when_the_session_breaks(run: Any, net: Any) -> None:
    async def main() -> None:
        async with net.listen() as server:

            async def collect(session: Any) -> list[bytes]:
                return [bytes(message) async for message in session.messages()]

            async with net.connect(server) as near:
                far = await server.accept()
                collecting = [asyncio.create_task(collect(session)) for session in (far, near)]
                for n in range(3):
                    await near.send(b"%d" % n)
            assert await collecting[0] == [b"0", b"1", b"2"]
            assert await collecting[1] == []

            near = await net.connect(server)
            far = await server.accept()
            breaking = asyncio.create_task(collect(far))
            await asyncio.sleep(0)
            near._inner.core.fail(BrokenError("as by a fault"))
            with pytest.raises(BrokenError, match="as by a fault"):
                await breaking
            await near.wait_closed()

    run(main())


def test_an_iteration_goes_on_after_a_cancelled_step(run: Any, net: Any) -> None:
    async def main() -> None:
        async with net.pair() as pair:
            messages = pair.far.messages()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await anext(messages)
            await pair.near.send(b"x")
            assert await anext(messages) == b"x"

    run(main())


@pytest.mark.parametrize("turns", [0, 1, 2, 3, 5, 8, 50])
def test_a_cancelled_wait_for_delivery_cancels_the_message(run: Any, net: Any, steps: Any, turns: int) -> None:
    async def main() -> None:
        async with net.pair() as pair:
            pair.near.limit_rate(16 << 10)  # bytes/s: it cannot be delivered by then
            ticket = await pair.near.send(bytes(4 * MIB))
            waiting = asyncio.create_task(ticket.wait())
            await steps(turns)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            if turns:  # a task that never began had nothing to cancel
                with pytest.raises(CancelledError):
                    await ticket
            else:
                ticket.cancel()
            pair.near.limit_rate(None)
            await pair.near.send(b"behind")
            assert await pair.far.recv() == b"behind"

    run(main())


def test_a_timeout_of_the_wait_lets_the_message_go_on_and_flush_cancels_nothing(run: Any, net: Any) -> None:
    async def main() -> None:
        async with net.pair() as pair:
            pair.near.limit_rate(64 << 10)
            ticket = await pair.near.send(bytes(MIB))
            with pytest.raises(DeadlineError, match="of 1048576 bytes are"):
                await ticket.wait(0.01)
            with pytest.raises(DeadlineError):
                await pair.near.flush(0.01)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await pair.near.flush()
            assert not ticket.done
            pair.near.limit_rate(None)
            assert await pair.far.recv() == bytes(MIB)
            await ticket
            await pair.near.flush()

    run(main())


def test_after_the_end_every_call_says_so(run: Any, net: Any) -> None:
    async def main() -> None:
        async with net.pair() as pair:
            near = pair.near
            await near.close()
            await near.close()
            assert isinstance(near.error, ClosedError) and await near.wait_closed()
            for call in (
                lambda: near.send(b""),
                lambda: near.recv(),
                lambda: near.stat("x"),
                lambda: near.send_file(net.root, "x"),
                lambda: near.adjust_streams(1),
                lambda: near.health_check(),
                lambda: near.limit_peer_rate(None),
            ):
                with pytest.raises(ClosedError):
                    await call()
            assert near.metrics().bytes_sent == 0

    run(main())


def test_the_end_of_the_session_ends_every_wait(run: Any, net: Any) -> None:
    async def main() -> None:
        async with net.pair(limits__open_transfers=8) as pair:
            near = pair.near
            near.limit_rate(16 << 10)
            held = []
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    while True:
                        held.append(await near.send(bytes(MIB)))
            waits = [
                asyncio.create_task(wait)
                for wait in (near.send(b""), near.recv(), near.flush(), held[-1].wait(), pair.far.recv("other"))
            ]
            await asyncio.sleep(0.01)
            near.abort()
            done = await asyncio.gather(*waits, return_exceptions=True)
            assert all(isinstance(outcome, ClosedError) for outcome in done), done
            assert await near.wait_closed() and await pair.far.wait_closed()

    run(main())


def test_a_session_of_another_loop_is_refused(run: Any, net: Any) -> None:
    async def main() -> None:
        async with net.pair() as pair:
            errors = []

            def elsewhere() -> None:
                try:
                    asyncio.run(pair.near.send(b""))
                except UsageError as err:
                    errors.append(str(err))

            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()
            assert errors == ["a session belongs to the event loop it was opened in, and this is another one"]

    run(main())
