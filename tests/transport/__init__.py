"""Tests of the KVCache mover over real sockets, on loopback."""
