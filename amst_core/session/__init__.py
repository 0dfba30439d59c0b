"""Sessions: reliable, exactly-once delivery of transfers over lanes that come and go."""
