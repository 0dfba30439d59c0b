"""The rules of `Transport`, each tried on transports that the caller makes, with the other side played by the check."""

from __future__ import annotations

import math
import socket
import struct
import threading
from collections.abc import Callable, Collection, Mapping
from typing import Final

from ..errors import AmstError, ConnectError, ProtocolError
from ..interfaces import (
    API_VERSION,
    PREAMBLE,
    PREAMBLE_MAGIC,
    Advertisement,
    Candidate,
    Capability,
    Endpoint,
    Lane,
    LaneRequest,
    LaneTimeouts,
    Transport,
)
from .conformance import PATIENCE_S, Conformance, Counted, NotApplicable, Rule, chosen
from .lane_trial import header, pattern
from .lanes import LANE_RULES, MORE_THAN_HOLDS
from .transport_trial import Accepting, MakeTransport, TransportTrial, closed_port, silent_port

_PROMPT_S: Final = 2.0
"""How long a probe may take, and how late a deadline may be kept."""

_DEADLINE_S: Final = 0.3
_MANY: Final = 16
_AT_ONCE: Final = 8
_THREADS: Final = 4
_OTHER_TAG: Final = 0x1234


def check_transport(
    make_transport: MakeTransport,
    *,
    patience_s: float = PATIENCE_S,
    more_than_holds: int = MORE_THAN_HOLDS,
    host: str = "127.0.0.1",
    unanswered: Callable[[], LaneRequest] | None = None,
    only: Collection[str] | None = None,
) -> Conformance:
    """Try every rule of `Transport`, and those of `Lane` on lanes that it opens; takes some seconds when all hold.

    ``make_transport`` makes a new transport that can reach others that it made. Where the transport lives on the
    core's TCP listener the check listens on ``host``. ``unanswered`` makes a request to where nobody ever answers,
    for a transport with a listener of its own. ``more_than_holds`` and ``only`` are as for `check_lane_pair`.

    Some rules count threads and descriptors of the whole process: run nothing else in it meanwhile.

    Raises:
        ConformanceError: a rule is broken; no further one is tried.
    """
    held: list[str] = []
    skipped: dict[str, str] = {}
    every: tuple[Rule[TransportTrial], ...] = (*TRANSPORT_RULES, *LANE_RULES)
    for rule in chosen(every, only):
        with TransportTrial(rule.name, patience_s, make_transport, more_than_holds, host, unanswered) as trial:
            try:
                rule.attempt(trial)
                held.append(rule.name)
            except NotApplicable as reason:
                skipped[rule.name] = str(reason)
    return Conformance(tuple(held), skipped)


# ---- what it says of itself -----------------------------------------------------------------------


def _identity(t: TransportTrial) -> None:
    transport = t.transport()
    t.check(isinstance(transport, Transport), "make_transport to return a Transport", repr(transport))
    t.check(isinstance(transport.name, str) and transport.name, "a name", repr(transport.name))
    t.check(
        transport.api_version == API_VERSION,
        f"the api_version of this core, {API_VERSION}", repr(transport.api_version),
    )  # fmt: skip
    t.check(isinstance(transport.capabilities, Capability), "capabilities of Capability", transport.capabilities)


def _cheap(t: TransportTrial) -> None:
    count = Counted(t)
    kept = [t.transport() for _ in range(_MANY)]
    count.nothing_of(_MANY, f"{len(kept)} transports that were made and not used")


def _probe(t: TransportTrial, host: str, port: int = 9000) -> Candidate:
    transport = t.transport()
    peer = Endpoint("amst", host, port) if host else None
    candidate = t.call(f"probe({peer})", transport.probe, peer)
    t.check(isinstance(candidate, Candidate), "probe to return a Candidate", repr(candidate))
    return candidate  # type: ignore[no-any-return]  # just checked


def _probe_raises(t: TransportTrial) -> None:
    for host, port in (("", 0), (t.host, 9000), ("::1", 9000), ("nobody.invalid", 0)):
        _probe(t, host, port)


def _probe_quick(t: TransportTrial) -> None:
    transport = t.transport()
    for peer in (None, Endpoint("amst", "192.0.2.1", 9000)):  # RFC 5737: nobody is there
        probing = t.begin(f"probe({peer})", transport.probe, peer)
        t.check(probing.ended(_PROMPT_S), f"probe to return within {_PROMPT_S:g} s", "it is still looking")


def _candidate(t: TransportTrial) -> None:
    for host in ("", t.host):
        candidate = _probe(t, host)
        name = t.transport().name
        t.check(candidate.transport == name, f"a candidate for {name!r}", repr(candidate.transport))
        t.check(isinstance(candidate.usable, bool), "usable to be True or False", repr(candidate.usable))
        t.check(candidate.reason.strip(), "a reason, also when it is usable", repr(candidate.reason))
        t.check(math.isfinite(candidate.score), "a finite score", candidate.score)
        t.check(isinstance(candidate.facts, Mapping), "facts to be a mapping", repr(candidate.facts))


def _advertisement(t: TransportTrial) -> None:
    for tag in (1, _OTHER_TAG):
        transport = t.transport()
        found = t.accepting(transport, tag=tag).advertisement
        t.check(isinstance(found, Advertisement), "an Advertisement", repr(found))
        t.check(found.transport == transport.name, f"an advertisement of {transport.name!r}", repr(found.transport))
        t.check(found.tag == tag, f"the tag that was given, {tag}", found.tag)
        t.check(isinstance(found.address, str), "an address in text, or an empty one", repr(found.address))


# ---- lanes ----------------------------------------------------------------------------------------


def _joined(t: TransportTrial) -> None:
    near, far = t.pair()
    for sender, receiver in ((near, far), (far, near)):
        frame = (header(1), pattern(1000))
        t.check(t.carry(sender, receiver, frame) == [frame], "the frame that the other end sent", "another one")


def _preamble(t: TransportTrial) -> None:
    accepting = t.accepting(t.transport(), tag=_OTHER_TAG)
    if accepting.advertisement.address:
        raise NotApplicable("the transport has a listener of its own")
    t.connect(t.transport(), accepting.request(t.patience_s))
    expected = f"the preamble of the request, with tag {_OTHER_TAG}, as the first bytes"
    t.wait(lambda: accepting.tags, expected, lambda: "a connection that began otherwise, or none")
    t.check(accepting.tags == [_OTHER_TAG], expected, f"tag {accepting.tags}")


def _separate(t: TransportTrial) -> None:
    opener, accepting = t.transport(), t.accepting(t.transport())
    nears = [t.connect(opener, accepting.request(t.patience_s)) for _ in range(_AT_ONCE)]
    fars = [accepting.lane() for _ in nears]
    t.check(len({id(lane) for lane in nears}) == _AT_ONCE, "a new lane each time", "one that is in use already")
    _each_has_a_peer(t, nears, fars)


def _threads(t: TransportTrial) -> None:
    opener, accepting = t.transport(), t.accepting(t.transport())
    start = threading.Barrier(_THREADS)

    def connect() -> Lane:
        start.wait(t.patience_s)
        return opener.connect(accepting.request(t.patience_s), LaneTimeouts())

    calls = [t.begin("connect, by several threads at once,", connect) for _ in range(_THREADS)]
    nears = [t.returns(call) for call in calls]
    for lane in nears:
        t.afterwards(lane.abort)
    _each_has_a_peer(t, nears, [accepting.lane() for _ in nears])


def _each_has_a_peer(t: TransportTrial, nears: list[Lane], fars: list[Lane]) -> None:
    sending = [t.sending(lane, (header(n), b"abc")) for n, lane in enumerate(nears)]
    got = sorted(t.receive(lane, 3)[0] for lane in fars)
    t.check(got == [header(n) for n in range(len(nears))], "each lane to have a peer of its own", "frames mixed up")
    for call in sending:
        t.returns(call)


def _reaches(t: TransportTrial, opener: Transport, accepting: Accepting, number: int) -> None:
    """A lane that is opened now arrives, and works."""
    near = t.connect(opener, accepting.request(t.patience_s))
    far = accepting.lane()
    frame = (header(number), b"abc")
    t.check(t.carry(near, far, frame) == [frame], "the frame that the other end sent", "another one")


def _two_listen(t: TransportTrial) -> None:
    opener = t.transport()
    both = [t.accepting(t.transport()) for _ in range(2)]
    for number, accepting in enumerate(both):
        _reaches(t, opener, accepting, number)


def _slow_deliver(t: TransportTrial) -> None:
    go_on = threading.Event()
    t.afterwards(go_on.set)
    taken: list[Lane] = []

    def deliver(lane: Lane) -> None:
        taken.append(lane)
        if len(taken) == 1:
            go_on.wait()

    accepting = t.accepting(t.transport(), deliver=deliver)
    t.own_listener(accepting)
    opener = t.transport()
    for _ in range(2):
        t.connect(opener, accepting.request(t.patience_s))
    t.wait(lambda: len(taken) == 2, "a lane to be delivered while deliver is busy with another one", lambda: "it waits")


def _raising_deliver(t: TransportTrial) -> None:
    taken: list[Lane] = []

    def deliver(lane: Lane) -> None:
        taken.append(lane)
        if len(taken) == 1:
            raise ProtocolError("this lane was not granted")

    accepting = t.accepting(t.transport(), deliver=deliver)
    t.own_listener(accepting)
    opener = t.transport()
    first = t.begin("connect", opener.connect, accepting.request(t.patience_s), LaneTimeouts())
    t.check(first.ended(t.patience_s), "connect to end", "it is still waiting")
    t.wait(lambda: taken, "a lane to be delivered", lambda: "none was")
    t.settle()
    t.connect(opener, accepting.request(t.patience_s))
    t.wait(lambda: len(taken) == 2, "lanes to be delivered after deliver has raised", lambda: "no more were")


# ---- no lane --------------------------------------------------------------------------------------


def _lives_on_tcp(t: TransportTrial) -> bool:
    return not t.accepting(t.transport()).advertisement.address


def _silent(t: TransportTrial) -> LaneRequest:
    if t.unanswered is not None:
        request: LaneRequest = t.call("unanswered", t.unanswered)
        return _within(request, _DEADLINE_S)
    if not _lives_on_tcp(t):
        raise NotApplicable("check_transport was not told of an address where nobody answers")
    held, port = silent_port(t.host)
    for sock in held:
        t.afterwards(sock.close)
    return _tcp_request(t, port)


def _refused(t: TransportTrial) -> LaneRequest:
    if _lives_on_tcp(t):
        holder, port = closed_port(t.host)
        t.afterwards(holder.close)
        return _tcp_request(t, port)
    transport = t.transport()
    request = t.accepting(transport).request(t.patience_s)
    t.call("close", transport.close)
    return request


def _tcp_request(t: TransportTrial, port: int) -> LaneRequest:
    advertisement = Advertisement(t.transport().name, 1)
    return LaneRequest(advertisement, t.host, port, PREAMBLE.pack(PREAMBLE_MAGIC, 1), _DEADLINE_S)


def _within(request: LaneRequest, timeout_s: float) -> LaneRequest:
    return LaneRequest(request.advertisement, request.host, request.port, request.preamble, timeout_s)


def _deadline(t: TransportTrial) -> None:
    connecting = t.begin("connect to where nobody answers", t.transport().connect, _silent(t), LaneTimeouts())
    in_time = connecting.ended(_DEADLINE_S + _PROMPT_S)
    t.check(in_time, f"connect to give up after its timeout_s of {_DEADLINE_S:g} s", "it is still waiting")
    t.raises(connecting, ConnectError)


def _refusal(t: TransportTrial) -> None:
    connecting = t.begin("connect to where nobody listens", t.transport().connect, _refused(t), LaneTimeouts())
    t.raises(connecting, ConnectError)


def _tried(t: TransportTrial) -> None:
    request = _refused(t)
    connecting = t.begin("connect to where nobody listens", t.transport().connect, request, LaneTimeouts())
    error = t.raises(connecting, Exception)
    address = request.advertisement.address or str(request.port)
    t.check(address in str(error), f"an error that names {address}, which was tried", repr(str(error)))


def _adopts_nothing(t: TransportTrial) -> None:
    accepting = t.accepting(t.transport())
    t.own_listener(accepting)
    near, far = socket.socketpair()
    t.afterwards(near.close)
    t.afterwards(far.close)
    t.raises(t.begin("adopt", t.transport().adopt, near, LaneTimeouts()), ProtocolError)


def _adopts_the_dead(t: TransportTrial) -> None:
    if not _lives_on_tcp(t):
        raise NotApplicable("the transport has a listener of its own")
    with socket.create_server((t.host, 0), family=socket.AF_INET6 if ":" in t.host else socket.AF_INET) as listener:
        near = socket.create_connection(listener.getsockname()[:2])
        far = listener.accept()[0]
    near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("@ii", 1, 0))
    near.close()  # by RST
    t.afterwards(far.close)
    adopting = t.begin("adopt of a connection that is gone", t.transport().adopt, far, LaneTimeouts())
    t.check(adopting.ended(t.patience_s), "adopt to end", "it is still blocked")
    if adopting.error is None:
        t.afterwards(adopting.result.abort)
        return  # the lane tells
    t.check(isinstance(adopting.error, AmstError), "an error of amst_core.errors", repr(adopting.error))


# ---- the end of a transport -----------------------------------------------------------------------


def _outlive(t: TransportTrial) -> None:
    opener, acceptor = t.transport(), t.transport()
    accepting = t.accepting(acceptor)
    near = t.connect(opener, accepting.request(t.patience_s))
    far = accepting.lane()
    t.call("close", opener.close)
    t.call("close", acceptor.close)
    t.settle()
    frame = (header(1), pattern(1000))
    t.check(t.carry(near, far, frame) == [frame], "lanes to go on after close", "another frame than the one sent")


def _stops_listening(t: TransportTrial) -> None:
    opener, acceptor = t.transport(), t.transport()
    accepting = t.accepting(acceptor)
    t.own_listener(accepting)
    _reaches(t, opener, accepting, 1)
    t.call("close", acceptor.close)
    connecting = t.begin("connect after close", opener.connect, accepting.request(t.patience_s), LaneTimeouts())
    t.raises(connecting, Exception)


def _close_again(t: TransportTrial) -> None:
    unused, used = t.transport(), t.transport()
    t.accepting(used)
    for transport in (unused, used):
        for _ in range(3):
            t.call("close, called again,", transport.close)


def _releases(t: TransportTrial) -> None:
    count = Counted(t)
    kept = []
    for _ in range(_MANY):
        opener, acceptor = t.transport(), t.transport()
        accepting = t.accepting(acceptor)
        lanes = [t.connect(opener, accepting.request(t.patience_s)), accepting.lane()]
        for lane in lanes:
            t.call("abort", lane.abort)
        accepting.stop()
        for transport in (opener, acceptor):
            t.call("close", transport.close)
        kept.append((opener, acceptor, lanes))
    count.nothing_of(_MANY, f"{len(kept)} transports that were used and closed")


TRANSPORT_RULES: Final[tuple[Rule[TransportTrial], ...]] = (
    Rule("says-who-it-is", "name, api_version and capabilities are there and of their types", _identity),
    Rule("construction-is-cheap", "making a transport starts no thread and opens no descriptor", _cheap),
    Rule("probe-never-raises", "probe returns a Candidate, whatever the peer", _probe_raises),
    Rule("probe-is-quick", f"probe answers within {_PROMPT_S:g} s, also of a peer that does not", _probe_quick),
    Rule("candidate-says-why", "the candidate names its transport and gives a reason", _candidate),
    Rule("advertisement-names-it", "advertise answers with its name and the tag that was given", _advertisement),
    Rule("lanes-are-joined", "what connect returns and what deliver or adopt gives are two ends of one lane", _joined),
    Rule("preamble-comes-first", "a connection to the core's listener begins with the preamble of the request",
         _preamble),
    Rule("lanes-are-separate", "several lanes at once have a peer each", _separate),
    Rule("connect-from-any-thread", "several threads may connect at once", _threads),
    Rule("listeners-are-separate", "two transports accept side by side, each its own lanes", _two_listen),
    Rule("slow-deliver-holds-up-nobody", "while deliver is busy with one lane, others are delivered", _slow_deliver),
    Rule("deliver-may-raise", "when deliver raises, that lane is lost and no other", _raising_deliver),
    Rule("connect-keeps-its-deadline", "connect to where nobody answers raises ConnectError after timeout_s",
         _deadline),
    Rule("refusal-is-a-connect-error", "connect to where nobody listens raises ConnectError", _refusal),
    Rule("connect-error-says-what-was-tried", "its message has the address", _tried),
    Rule("adopts-nothing-with-own-listener", "a transport with an address of its own refuses adopt by ProtocolError",
         _adopts_nothing),
    Rule("dead-connection-is-an-amst-error", "adopt of a connection that is gone raises no bare OSError",
         _adopts_the_dead),
    Rule("lanes-outlive-their-transport", "close leaves lanes alone that were handed out", _outlive),
    Rule("close-stops-listening", "after close nobody reaches the address that was advertised", _stops_listening),
    Rule("transport-close-idempotent", "close may be called again, and on a transport that was never used",
         _close_again),
    Rule("close-releases-everything", "no thread and no descriptor of a transport is left after close", _releases),
)  # fmt: skip
"""In the order in which they are tried, before those of lanes."""
