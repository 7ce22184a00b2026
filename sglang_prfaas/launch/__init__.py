"""The command line: `python -m sglang_prfaas.launch`."""
