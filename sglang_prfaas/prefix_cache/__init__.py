"""The hybrid prefix cache as values and state machines, without bytes, sockets or SGLang.

`block_hash`: hashes of a prompt's blocks, SGLang's own. The pool of one host: `groups`, `ledger`, `tree`, `pool`. The
index of all sites: `changes` come in, `holder_sets` and `block_table` hold them, `index` and `matching` answer. See
docs/prefix_cache.md.
"""
