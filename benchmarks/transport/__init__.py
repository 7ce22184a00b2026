"""How fast the KVCache mover is, beside plain sockets."""
