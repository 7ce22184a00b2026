"""Codecs: full-attention KVCache made smaller for the wire, item by item."""
