"""Opening and accepting sessions: where plugins, settings and credentials come together."""
