"""The TOML of a local deployment, with places for `str.format`."""

_SITE = """\
[site]
name = "{site}"
role = "{site}"
model = {model}
served_model_name = "{name}"
log_dir = {logs}
args = {args}

[site.env]
{env}

"""

_TRANSPORT = """\
[transport]
heartbeat_timeout_s = {heartbeat}
keys_dir = {keys}
{transport}

[limits]
startup_timeout_s = {startup}
"""

_PRFAAS_OWN = """\
[[servers]]
name = "prfaas-prefill-0"
role = "prefill"
port = {p0}
bootstrap_port = {p1}
{mover}
args = {prefill_args}

[[links]]
to_site = "pd"
capacity_gbps = {capacity}

[agent]
port = {p2}
tls = {prfaas_tls}
reports_port = {p8}
commands_from = ["prfaas", "pd"]

"""

PRFAAS = "# The PrfaaS datacenter: prefill only, for other sites.\n" + _SITE + _PRFAAS_OWN + _TRANSPORT

_PD_OWN = """\
[[servers]]
name = "pd-prefill-0"
role = "prefill"
port = {p3}
bootstrap_port = {p4}
args = {prefill_args}

[[servers]]
name = "pd-decode-0"
role = "decode"
port = {p5}
bootstrap_port = {p6}
args = {decode_args}

[servers.env]
{decode_env}

[agent]
port = {p7}
reports_port = {p9}

"""

PD = (
    "# The PD datacenter: serves requests end to end, and takes prefills from the PrfaaS site.\n"
    + _SITE
    + _PD_OWN
    + _TRANSPORT
    + "min_prefill_servers = 0\n"
)

PRFAAS_CACHE = """
[prefix_cache]
backend = "local"
disk_dir = {cache_dir}
disk_bytes = 268435456
prefill_tokens_per_s = {cache_rate}

[[prefix_cache.peers]]
name = "pd"
host = "127.0.0.1"
port = {p12}
"""

PD_CACHE = """
[prefix_cache]
backend = "local"
disk_dir = {cache_dir}
disk_bytes = 268435456
serve_port = {p12}
serve_to = ["prfaas"]
"""

ROUTER = """\
# The router: beside the PD datacenter; reaches each site through its agent.
[router]
model = {model}
served_model_name = "{name}"
port = {p11}

[policy]
threshold_tokens = {threshold}

[reports]
keys_dir = {keys}

[[sites]]
name = "prfaas"
role = "prfaas"
agent_url = "{prfaas_scheme}://127.0.0.1:{p2}"
reports_port = {p8}

[[sites]]
name = "pd"
role = "pd"
agent_url = "http://127.0.0.1:{p7}"
reports_port = {p9}
"""
