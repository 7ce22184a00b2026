"""A conversation trace over servers with a prefix cache each: hit rates by pool size, and routing with and without."""
