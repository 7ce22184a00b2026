"""Cases that run inside SGLang's own modules, in a process of their own: see `test_linear_attention.py`."""
