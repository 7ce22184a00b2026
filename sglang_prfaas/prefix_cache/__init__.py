"""The hybrid prefix cache as values and state machines: block hashes, the pool of one host, the index of all sites."""
