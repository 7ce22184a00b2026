"""Linear attention prefill with `prfaas_kernels` in SGLang: ``--linear-attn-prefill-backend prfaas``.

`hooks` says where SGLang is touched, `kernels` holds the classes and the function that stand there, `contracts` what
inputs they take; `kernels/README.md` has the mathematics.
"""
