"""Tests of the pure parts of the KVCache mover: no sockets, no sleeps."""
