"""The bytes on the wire: lane frames and control messages. Pure codecs, no I/O (docs/wire-format.md)."""
