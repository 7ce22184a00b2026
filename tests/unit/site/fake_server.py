"""A server for tests of the supervisor: answers /health, and does what its environment says.

FAKE_EXIT=N        end with status N at once.
FAKE_EVENTS=FILE   append `NAME started`, `NAME asked to end`, `NAME ends`.
FAKE_DEAF=1        ignore SIGTERM.
FAKE_SICK=FILE     answer 503 while that file exists.
FAKE_CHILD=FILE    start a child of its own and write its pid there.
FAKE_SLOW=FILE     do not listen until that file exists.
FAKE_BUSY=FILE     /v1/loads tells of as many running requests as that file says.
FAKE_SWITCH=FILE   what /pd_role_switch does: the file's words in turn (busy, refuse, break, sick); then it obeys.
FAKE_HOLD=FILE     answer POST only once that file exists.
"""

import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time


def record(text: str) -> None:
    if path := os.environ.get("FAKE_EVENTS"):
        with open(path, "a") as file:
            file.write(f"{os.environ['PRFAAS_SERVER']} {text}\n")


class Role:
    """What the server is now."""

    now = ""
    switches = 0
    sick = False


def lines_of(variable: str) -> list[str]:
    path = os.environ.get(variable, "")
    if not os.path.exists(path):
        return []
    with open(path) as file:
        return file.read().split()


def loads() -> bytes:
    running = int((lines_of("FAKE_BUSY") or ["0"])[0])
    load = {
        "timestamp": time.time(),
        "num_running_reqs": running,
        "max_total_num_tokens": 1000,
        "disaggregation": {"mode": Role.now},
        "queues": {"waiting": 0},
    }
    return json.dumps({"loads": [load]}).encode()


def server_info() -> bytes:
    """SGLang's, as far as the agent reads it."""
    start = sys.argv.index("--lora-paths") + 1 if "--lora-paths" in sys.argv else len(sys.argv)
    named = [text.split("=") for text in sys.argv[start:] if "=" in text]
    listed = [{"lora_name": name, "lora_path": path, "lora_id": f"id of {path}"} for name, path in named]
    return json.dumps({"version": "0.5.23", "lora_paths": listed}).encode()


ANSWERS = {"/v1/loads": loads, "/server_info": server_info}


def switch_role(body: bytes) -> tuple[int, bytes]:
    plan = lines_of("FAKE_SWITCH")
    word = plan[Role.switches] if Role.switches < len(plan) else ""
    Role.switches += 1
    role = json.loads(body)["new_role"]
    record(f"asked to {role}{' but ' + word if word else ''}")
    if word == "busy":
        return 400, b'{"success": false, "message": "instance is not idle; drain", "safe_to_restore": true}'
    if word == "refuse":
        return 400, b'{"success": false, "message": "no headroom", "safe_to_restore": true}'
    if word == "break":
        return 400, b'{"success": false, "message": "restart required", "safe_to_restore": false}'
    Role.now, Role.sick = role, word == "sick"
    return 200, b'{"success": true, "message": "ok", "safe_to_restore": false}'


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        sick = Role.sick or os.path.exists(os.environ.get("FAKE_SICK", ""))
        answer = ANSWERS.get(self.path)
        body = answer() if answer is not None else f"{os.environ['PRFAAS_SERVER']} {self.path}".encode()
        sick = sick and self.path != "/v1/loads"
        self.send_response(503 if sick else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", "0"))
        body = self.rfile.read(length)
        status = 200
        if self.path == "/pd_role_switch":
            status, body = switch_role(body)
        if (path := os.environ.get("FAKE_HOLD")) and not os.path.exists(path):
            record("held")
        while (path := os.environ.get("FAKE_HOLD")) and not os.path.exists(path):
            time.sleep(0.02)
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        print(format % args, flush=True)


def option(name: str) -> str:
    return sys.argv[sys.argv.index(name) + 1]


class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6 if ":" in option("--host") else socket.AF_INET


def main() -> None:
    Role.now = option("--disaggregation-mode")
    print("hello from", os.environ["PRFAAS_SERVER"], flush=True)
    if code := os.environ.get("FAKE_EXIT"):
        print("RuntimeError: no such device", flush=True)
        sys.exit(int(code))
    if path := os.environ.get("FAKE_CHILD"):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        with open(path, "w") as file:
            file.write(str(child.pid))
    while (path := os.environ.get("FAKE_SLOW")) and not os.path.exists(path):
        time.sleep(0.02)
    if "--disaggregation-bootstrap-port" in sys.argv:
        port = int(option("--disaggregation-bootstrap-port"))
        bootstrap = Server((option("--host"), port), Handler)
        threading.Thread(target=bootstrap.serve_forever, daemon=True).start()
    server = Server((option("--host"), int(option("--port"))), Handler)
    server.daemon_threads = True

    def on_term(number: int, frame: object) -> None:
        record("asked to end")
        if not os.environ.get("FAKE_DEAF"):
            threading.Thread(target=server.shutdown).start()

    signal.signal(signal.SIGTERM, on_term)
    record("started")
    server.serve_forever()
    record("ends")


if __name__ == "__main__":
    main()
