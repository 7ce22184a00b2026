"""The KVCache mover: items of a layout, from one rank's memory into another's, over several TCP connections.

It knows nothing of tokens or models. Pure: `messages`, `framing`, `layout`, `handshake`, `streams`, `session`, `rooms`.

Around them: `send_mover` on a prefill rank, `receive_mover` on a decode rank, which put their parts together and hold
what callers use. The parts of either, from the bottom up, each importing only those before it: `..._table` (who is
served, under one lock), `..._control` (what is said to peers, and how sessions end), `..._data` (the data connections),
`send_handshake` or `receive_dialer` (how a session begins), `..._handler` (what is done with messages), `..._upkeep`
(what is done by the clock). docs/architecture.md says in which threads.

`directory`, `registration` and `lookup` are for finding each other; `loop` owns ZeroMQ sockets, `acceptor` and
`data_tcp` the data connections, `memory` the pages, `security` the keys; `gateway` and `dial_out` join two sites of
which one cannot be dialled. The wire is described in docs/protocol.md.
"""
