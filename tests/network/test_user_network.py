"""pykvm.network.user_network: passt itself, with this host's kernel as the guest."""

import http.server
import os
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import textwrap
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from pykvm.network.child_process import ChildProcess
from pykvm.network.mac_address import mac_address
from pykvm.network.specification import Forward
from pykvm.network.user_network import PasstError, UserNetwork
from tests.rigs.frame_relay import FrameRelay
from tests.rigs.network_namespace import NetworkNamespace, need_tun

pytestmark = pytest.mark.unit

MAC = mac_address("guest")
CONTENT = os.urandom(300_000)


@pytest.fixture(autouse=True)
def _passt() -> None:
    if shutil.which("passt") is None:
        pytest.skip("passt is not installed")


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT)

    def log_message(self, format: str, *args: object) -> None:
        pass


def _serve(address: str, port: int = 0) -> socketserver.ThreadingTCPServer:
    # Not an HTTPServer, which asks a resolver for its own name.
    server = socketserver.ThreadingTCPServer((address, port), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@pytest.fixture
def web() -> Iterator[int]:
    """The port of a web server on this host's loopback address."""
    server = _serve("127.0.0.1")
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _relay(network: UserNetwork) -> FrameRelay:
    need_tun()
    address = network.address
    return FrameRelay(network.socket, MAC, str(address.address), str(address.gateway))


def _fetch(url: str) -> bytes:
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=10) as page:
        content: bytes = page.read()
        return content


def test_a_guest_fetches_from_the_host(namespace: NetworkNamespace, web: int) -> None:
    with UserNetwork(MAC, host=True) as network:
        relay = _relay(network)
        with relay.namespace.entered():
            assert _fetch(f"http://10.0.2.2:{web}/") == CONTENT
        relay.close()
        assert network.complaint() == ""


def test_the_hosts_loopback_is_closed_to_a_guest(namespace: NetworkNamespace, web: int) -> None:
    with UserNetwork(MAC) as network:
        relay = _relay(network)
        with relay.namespace.entered(), pytest.raises(OSError, match=r"timed out|unreach|refused"):
            socket.create_connection(("10.0.2.2", web), timeout=2)
        relay.close()


def test_a_host_fetches_from_the_guest(namespace: NetworkNamespace) -> None:
    port = _free_port()
    need_tun()
    with UserNetwork(MAC, forwards=[Forward("tcp", "127.0.0.1", port, 8080)]) as network:
        relay = _relay(network)
        with relay.namespace.entered():
            guest = _serve("10.0.2.15", 8080)
        assert _fetch(f"http://127.0.0.1:{port}/") == CONTENT
        guest.shutdown()
        guest.server_close()
        relay.close()


def test_with_a_way_out(namespace: NetworkNamespace) -> None:
    """A default route on the host is what passt wants to see."""
    need_tun()  # before anything is made that a skip would leave
    commands = ("link add out type bridge", "link set out up", "addr add 192.0.2.9/24 dev out")
    for command in (*commands, "route add default via 192.0.2.1"):
        subprocess.run(["ip", *command.split()], check=True)
    server = _serve("192.0.2.9")
    with UserNetwork(MAC) as network:
        relay = _relay(network)
        with relay.namespace.entered():
            assert _fetch(f"http://192.0.2.9:{server.server_address[1]}/") == CONTENT
        relay.close()
    server.shutdown()
    server.server_close()
    subprocess.run(["ip", "link", "del", "out"], check=True)


def test_a_port_that_is_taken(namespace: NetworkNamespace) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PasstError, match=rf"^passt does not start: .*port.*{port}.*: choose"):
            UserNetwork(MAC, forwards=[Forward("tcp", "127.0.0.1", port, 80)])
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_passt_is_killed(namespace: NetworkNamespace) -> None:
    with UserNetwork(MAC) as network:
        assert network.complaint() == ""
        os.kill(network._child.pid, signal.SIGKILL)
        assert network._child.wait(5)
        assert network.complaint().startswith("passt has ended: ")
        assert network.socket.recv(10) == b""


def test_passt_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(PasstError, match=r"not installed: type `.*apt-get install passt`$"):
        UserNetwork(MAC)


def test_a_passt_that_says_nothing(
    namespace: NetworkNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Another program of the name, which ends at once."""
    (tmp_path / "passt").write_text("#!/bin/sh\n")
    (tmp_path / "passt").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(PasstError, match=r"^passt does not start: it does not answer: choose"):
        UserNetwork(MAC)


def test_a_killed_process_leaves_no_passt(namespace: NetworkNamespace) -> None:
    script = f"""
        import os, signal
        from pykvm.network.user_network import UserNetwork
        network = UserNetwork({MAC!r})
        print(network._child.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], check=False, stdout=subprocess.PIPE
    )
    assert done.returncode == -9
    assert _ends(int(done.stdout))


def test_a_program_without_a_socket_ends_with_its_parent() -> None:
    script = """
        import os, signal
        from pykvm.network.child_process import ChildProcess
        print(ChildProcess(["sleep", "1000"]).pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], check=False, stdout=subprocess.PIPE
    )
    assert _ends(int(done.stdout))


def test_complaints_of_a_program() -> None:
    with ChildProcess(["sh", "-c", "echo First >&2; echo; echo LAST one >&2; exit 3"]) as child:
        assert child.wait(10)
        assert not child.alive
        assert child.complaint() == "lAST one"
        child.close()
        child.close()
        assert child.wait(0)


def _ends(pid: int) -> bool:
    """Return whether a process, which is not ours any more, ends soon."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False
