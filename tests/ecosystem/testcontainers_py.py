"""The usual calls of testcontainers for Python against the engine at DOCKER_HOST.

Without an argument the library's reaper is not used (TESTCONTAINERS_RYUK_DISABLED); with the argument `reaper` a
program of its own starts a container and ends without stopping it, which is for the reaper to do
(RYUK_CONTAINER_IMAGE).
`passed` is the last line unless an assertion or an exception of the library ended the program.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.request import urlopen

import docker
from testcontainers.core.container import DockerContainer
from testcontainers.core.image import DockerImage
from testcontainers.core.network import Network
from testcontainers.core.wait_strategies import HttpWaitStrategy, LogMessageWaitStrategy

IMAGE = "alpine:latest"
SERVER = "mkdir /www; echo page >/www/index.html; echo started; exec httpd -f -p 80 -h /www"
STARTUP = 180


def server():
    container = (
        DockerContainer(IMAGE)
        .with_command(["sh", "-c", SERVER])
        .with_env("GREETING", "two words")
        .with_tmpfs_mount("/scratch", "size=1m")
        .with_exposed_ports(80)
        .waiting_for(LogMessageWaitStrategy("started").with_startup_timeout(STARTUP))
    )
    with container:
        HttpWaitStrategy(80).for_status_code(200).with_startup_timeout(STARTUP).wait_until_ready(container)
        url = f"http://{container.get_container_host_ip()}:{container.get_exposed_port(80)}/"
        assert urlopen(url, timeout=60).read() == b"page\n"
        assert b"started" in container.get_logs()[0]
        ran = container.exec(["sh", "-c", "echo $GREETING; exit 4"])
        assert (ran.exit_code, ran.output) == (4, b"two words\n"), ran
        assert re.match(rb" +0 +[1-9]\d{4,} +65536\n$", container.exec("cat /proc/self/uid_map").output)
        container.copy_into_container(b"kept", "/tmp/note")
        with tempfile.TemporaryDirectory() as directory:
            container.copy_from_container("/tmp/note", Path(directory) / "note")
            assert (Path(directory) / "note").read_bytes() == b"kept"
        name = container.get_wrapped_container().id
    assert not docker.from_env().containers.list(all=True, filters={"id": name})


def network():
    with Network() as net:
        sleeper = DockerContainer(IMAGE).with_network(net).with_network_aliases("alias").with_command("sleep 600")
        with sleeper, DockerContainer(IMAGE).with_network(net).with_command("sleep 600") as other:
            ran = other.exec("ping -c 1 alias")
            assert ran.exit_code == 0, ran


def build():
    context = Path(__file__).parent / "context"
    with DockerImage(path=context, tag="testcontainers-py-built", buildargs={"NAME": "built-py"}) as image:
        with DockerContainer(str(image)) as container:
            assert container.wait() == 0
            assert container.get_logs()[0] == b"built-py\ncopied\n"


def reaper():
    command = [sys.executable, __file__, "leave"]
    left = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    client = docker.from_env(timeout=90)
    assert client.containers.get(left).status == "running"
    end = time.monotonic() + STARTUP
    # Itself, too.
    for chosen in ({"id": left}, {"name": "testcontainers-ryuk-"}):
        while client.containers.list(all=True, filters=chosen):
            assert time.monotonic() < end, f"left: {chosen}"
            time.sleep(0.5)


def leave():
    container = DockerContainer(IMAGE).with_command("sleep 600").start()
    print(container.get_wrapped_container().id, flush=True)
    # Not an orderly end, which would stop the container.
    os._exit(0)


if sys.argv[1:] == ["leave"]:
    leave()
for part in [reaper] if sys.argv[1:] == ["reaper"] else [server, network, build]:
    started = time.monotonic()
    part()
    print(f"{part.__name__} ({time.monotonic() - started:.1f} s)", flush=True)
print("passed")
