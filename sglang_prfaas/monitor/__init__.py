"""What is watched in the servers and on the links. So far: their KV events.

Pure: `kv_events` (messages to changes), `event_stream` (order, gaps, restarts). Around them: `kv_subscriber` (ZeroMQ).
"""
