"""Cases that import SGLang: run by test_layerwise_modes in a process of their own."""
