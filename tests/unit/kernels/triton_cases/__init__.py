"""Cases for Triton's kernels. Each file runs in a process of its own, on a GPU or in Triton's interpreter.

pytest collects only ``test_triton_kernels.py`` beside this folder, which starts them.
"""
