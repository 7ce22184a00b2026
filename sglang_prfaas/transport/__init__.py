"""The KVCache mover: items of a layout, from one rank's memory into another's, over several TCP connections.

It knows nothing of tokens or models. Pure: `messages`, `framing`, `layout`, `handshake`, `streams`, `session`, `rooms`.
Around them: `send_mover` (with `acceptor`, `send_data`, `send_session`) on a prefill rank, `receive_mover` (with
`receive_data`, `receive_session`, `lookup`) on a decode rank, `directory` and `registration` for finding each other;
`loop` owns ZeroMQ sockets, `data_tcp` the data connections, `memory` the pages, `security` the keys. The wire is
described in docs/protocol.md.
"""
