"""Another mover inside a site: a decode server takes KVCache of its own site's prefill servers over SGLang's own RDMA
backend, and that of other sites over prfaas.

Every server of the site runs the transfer backend `prfaas`. Where `transport.inner_rail` names a rail, each rank also
runs that backend's manager. A prefill rank's entry in the bootstrap directory tells ranks of its own site where its
rail listens. Handshake, layout check and signs of life stay with prfaas; decode asks for the bytes over the one or the
other (`receiver`), and prefill sends them over the one it is asked on (`sender`).
"""

NONE = "none"
"""`transport.inner_rail` of a site without one."""
