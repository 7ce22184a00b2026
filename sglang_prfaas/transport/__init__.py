"""The KVCache mover: items of a layout, from one rank's memory into another's, over several TCP connections.

It knows nothing of tokens or models. `messages`, `framing`, `layout`, `streams` and `session` are pure; `control_zmq`,
`data_tcp`, `memory` and `mover` are the thin adapters around them. The wire is described in docs/protocol.md.
"""
