"""The settings in force: frozen, in bytes and seconds. `load.load_settings` makes them; nothing else has defaults.

A field is named as the last part of its key in `registry.KEYS`, except that ``chunk_size_kb`` becomes
``chunk_size``, because every size here is in bytes. Times are in seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class AmstSettings:
    """``transport.amst.*``: streams, chunks (bytes), pace (bytes/s) and time limits (seconds) of every session."""

    chunk_size: int
    max_streams: int
    min_streams: int
    auto_tune: bool
    pacing_enabled: bool
    pacing_rate: float
    connect_timeout: float
    read_timeout: float
    write_timeout: float
    health_check_interval: float


@dataclass(frozen=True, slots=True)
class ModeSettings:
    """``transport.modes.*``: what decides about the mode, and what each starts with; ``mode`` is ``auto`` or a `Mode`.

    Seconds, bytes/s and a share of what is sent.
    """

    mode: str
    auto_mode: bool
    mode_check_interval: float
    detector: str
    datacenter_latency: float
    internet_latency: float
    datacenter_bandwidth: float
    internet_loss: float
    datacenter_streams: int
    internet_streams: int


@dataclass(frozen=True, slots=True)
class TransportSettings:
    """``transport.*``."""

    amst: AmstSettings
    modes: ModeSettings


@dataclass(frozen=True, slots=True)
class CongestionSettings:
    """``congestion.*``: ``algorithm`` is ``auto`` or the name of a plugin, ``backend`` a word of `Backend`, ``base``
    ``auto`` or what the system calls a congestion control.
    """

    algorithm: str
    backend: str
    base: str


@dataclass(frozen=True, slots=True)
class SecuritySettings:
    """``security.*``: whether data may travel in plaintext."""

    plaintext: bool
    allow_plaintext: bool


@dataclass(frozen=True, slots=True)
class LimitSettings:
    """``limits.*``: what a peer can cost this process; ``memory`` and ``max_message`` in bytes."""

    memory: int
    max_message: int
    open_transfers: int
    sessions: int
    lanes: int
    unauthenticated: int
    handshake_timeout: float
    session_timeout: float


@dataclass(frozen=True, slots=True)
class FileSettings:
    """``files.*``: ``fsync`` is a word of `amst_core.files.journal.Fsync`, ``keep_partial`` in seconds."""

    fsync: str
    keep_partial: float


@dataclass(frozen=True, slots=True)
class Settings:
    """Every setting of one manager. ``plugins`` maps a plugin's name to its options, deeply read-only."""

    transport: TransportSettings
    congestion: CongestionSettings
    security: SecuritySettings
    limits: LimitSettings
    files: FileSettings
    plugins: Mapping[str, Mapping[str, object]] = field(hash=False)
