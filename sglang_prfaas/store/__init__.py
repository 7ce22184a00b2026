"""Prefix cache that outlives a server: host memory first, then a disk directory or a distributed store.

Objects are pages of KVCache and recurrent states, named by model, layout, shard and the hash of the whole prefix
(`identity`). `hits` says which prefixes can be used, `host_tier` keeps objects in memory by the rules of
`prefix_cache.pool`, `disk` and `mooncake` are the tiers behind it, `tiers` puts them together. `remote` fetches
from other sites what is missing, where `fetch_choice` says that it pays.
"""
