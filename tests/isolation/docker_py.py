"""The usual calls of docker-py, the Docker SDK for Python, against the engine at DOCKER_HOST.

An assertion or an exception of the library ends the script with status 1, and `passed` is the last line otherwise.
"""

import io
import tarfile

import docker
from docker.types import Healthcheck, IPAMConfig, IPAMPool, LogConfig, Mount, Ulimit

IMAGE = "alpine:latest"
client = docker.from_env(timeout=90)
PREFIX = "py-"


def clean():
    for container in client.containers.list(all=True, filters={"name": PREFIX}):
        container.remove(force=True, v=True)
    for network in client.networks.list(names=[PREFIX + "net"]):
        network.remove()
    for volume in client.volumes.list(filters={"name": PREFIX}):
        volume.remove(force=True)


def archive(name, content):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        entry = tarfile.TarInfo(name)
        entry.size = len(content)
        tar.addfile(entry, io.BytesIO(content))
    return stream.getvalue()


def engine():
    assert client.ping()
    assert client.version()["ApiVersion"]
    assert client.info()["OSType"] == "linux"
    assert client.df()["Images"]
    assert client.images.get(IMAGE).tags
    assert any(IMAGE in image.tags for image in client.images.list())
    assert client.images.get(IMAGE).history()


def running_container():
    assert client.containers.run(IMAGE, "echo hello", remove=True) == b"hello\n"
    container = client.containers.run(
        IMAGE,
        ["sh", "-c", "echo started; exec sleep 600"],
        name=PREFIX + "main",
        detach=True,
        init=True,
        hostname="main",
        environment={"A": "1", "B": "two words"},
        labels={"purpose": "test"},
        mem_limit="64m",
        nano_cpus=500_000_000,
        pids_limit=50,
        cap_drop=["ALL"],
        cap_add=["NET_BIND_SERVICE"],
        security_opt=["no-new-privileges"],
        sysctls={"net.ipv4.ip_unprivileged_port_start": "1000"},
        ulimits=[Ulimit(name="nofile", soft=1024, hard=2048)],
        log_config=LogConfig(type="json-file", config={"max-size": "1m"}),
        mounts=[Mount("/data", PREFIX + "data", type="volume"), Mount("/scratch", None, type="tmpfs", tmpfs_size=1 << 20)],
        tmpfs={"/cache": "size=1m,mode=1777"},
        healthcheck=Healthcheck(test=["CMD", "true"], interval=1_000_000_000, retries=2),
        restart_policy={"Name": "on-failure", "MaximumRetryCount": 2},
        extra_hosts={"somewhere": "10.1.2.3"},
        dns=["192.168.65.1"],
        shm_size="16m",
        oom_score_adj=100,
        stop_signal="SIGTERM",
        working_dir="/srv",
    )
    container.reload()
    assert container.status == "running", container.status
    assert container.attrs["Config"]["Labels"]["purpose"] == "test"
    assert b"started" in container.logs()
    assert container.exec_run(["sh", "-c", "echo $B"]).output == b"two words\n"
    assert container.exec_run(["sh", "-c", "exit 3"]).exit_code == 3
    assert container.put_archive("/tmp", archive("note", b"kept"))
    assert container.exec_run("cat /tmp/note").output == b"kept"
    chunks, stat = container.get_archive("/tmp/note")
    assert stat["size"] == 4 and b"kept" in b"".join(chunks)
    assert container.top()["Processes"]
    assert container.stats(stream=False)["memory_stats"]
    assert any(change["Path"] == "/tmp/note" for change in container.diff())
    container.update(mem_limit="96m", memswap_limit="192m")
    container.pause()
    container.unpause()
    container.rename(PREFIX + "renamed")
    image = container.commit(repository="py-committed", tag="v1", changes=["ENV C=3"])
    assert client.containers.run(image.id, ["sh", "-c", "echo $C"], remove=True) == b"3\n"
    client.images.remove(image.id, force=True)
    assert next(container.export())
    container.restart(timeout=1)
    container.kill()
    assert container.wait(timeout=30)["StatusCode"] in (137, 143)
    container.start()
    container.stop(timeout=1)
    container.remove(v=True)


def networks():
    pool = IPAMPool(subnet="10.123.0.0/24", gateway="10.123.0.1")
    network = client.networks.create(
        PREFIX + "net", driver="bridge", ipam=IPAMConfig(pool_configs=[pool]), labels={"a": "b"}, check_duplicate=True
    )
    first = client.containers.run(IMAGE, "sleep 600", name=PREFIX + "first", detach=True, init=True, network=network.name)
    second = client.containers.create(IMAGE, ["ping", "-c", "1", "alias"], name=PREFIX + "second")
    network.disconnect(first)
    network.connect(first, aliases=["alias"], ipv4_address="10.123.0.77")
    network.connect(second)
    second.start()
    assert second.wait(timeout=60)["StatusCode"] == 0, second.logs()
    network.reload()
    assert first.id in network.attrs["Containers"]
    second.remove()
    first.remove(force=True)
    network.remove()


def volumes():
    client.volumes.create(PREFIX + "plain", labels={"x": "y"})
    client.volumes.create(PREFIX + "memory", driver="local", driver_opts={"type": "tmpfs", "device": "tmpfs", "o": "size=1m"})
    line = ["sh", "-c", "echo x >/plain/file && grep -q ' /memory tmpfs' /proc/mounts"]
    client.containers.run(
        IMAGE, line, remove=True, volumes={PREFIX + "plain": {"bind": "/plain", "mode": "rw"}, PREFIX + "memory": {"bind": "/memory"}}
    )
    assert client.volumes.get(PREFIX + "plain").attrs["Labels"] == {"x": "y"}


def build_and_events():
    text = b"FROM alpine\nARG NAME\nRUN echo $NAME >/name\nCMD cat /name\n"
    image, _ = client.images.build(fileobj=io.BytesIO(archive("Dockerfile", text)), custom_context=True, buildargs={"NAME": "built"}, rm=True)
    events = client.events(decode=True, filters={"type": "container"})
    assert client.containers.run(image.id, remove=True) == b"built\n"
    assert next(events)["Action"] == "create"
    events.close()
    client.images.remove(image.id, force=True)
    assert next(client.images.get(IMAGE).save())


clean()
try:
    for part in (engine, running_container, networks, volumes, build_and_events):
        part()
        print(part.__name__)
finally:
    clean()
print("passed")
