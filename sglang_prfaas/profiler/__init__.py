"""Measures running servers and writes what they can do as a profile file: `launch profile`."""
