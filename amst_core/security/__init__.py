"""Who may speak, and how bytes are kept secret and whole: token, keys, sealing, TLS (docs/security.md).

Imported only when a session opens; nothing here touches a socket.
"""
