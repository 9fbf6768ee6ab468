//! Commands of docker with their output, which is the same with isolation on and off.

/// A name, lines of a shell and their output. Names of containers, volumes and files are unique: several cases run at
/// once.
pub struct Case(pub &'static str, pub &'static str, pub &'static str);

pub const CASES: &[Case] = &[
    Case(
        "cp out, ownership kept",
        "docker run --name=out alpine sh -c 'echo out >/tmp/f; chown 1000:1000 /tmp/f; chmod 640 /tmp/f'
         docker cp out:/tmp/f - | tar --numeric-owner -tvf - | awk '{ print $1, $2, $3 }'
         docker cp out:/tmp/f copied && cat copied; docker rm out",
        "-rw-r----- 1000/1000 4\nout\nout\n",
    ),
    Case(
        "cp while it runs: working directory, /etc, links, volume, tmpfs, parent of a volume",
        "rm -rf busy; mkdir -p busy/d/deep busy/tree/v busy/tree/srv; echo file >busy/f; echo deep >busy/d/deep/g; ln -s f busy/l
         echo parent | tee busy/tree/v/p >busy/tree/srv/p
         docker run -d --init --name=busy --workdir=/srv -v busy:/v --tmpfs=/t alpine sleep 3600 >started
         docker exec busy ls f d l p /etc/added >absent 2>&1
         docker cp busy/f busy:/srv; docker cp busy/d busy:/srv; docker cp busy/l busy:/srv/l; docker cp -L busy/l busy:/srv/followed
         docker cp busy/f busy:/etc/added; docker cp busy/f busy:/v/f; docker cp busy/f busy:/t/f; tar -C busy/tree -cf - v srv | docker cp - busy:/
         docker exec busy sh -c 'cat f d/deep/g followed /etc/added /v/f p /v/p; readlink l; ls /t; echo own >>f; echo own >new
         rm d/deep/g; mkdir d/deep/g; echo below >d/deep/g/h; ls -R d'
         docker cp busy:/srv busy/out; cat busy/out/f busy/out/new busy/out/d/deep/g/h
         docker cp busy:/v/f - | tar -xOf -; docker cp busy:/t/f - | tar -xOf -; docker rm -f busy; docker volume rm busy",
        "file\ndeep\nfile\nfile\nfile\nparent\nparent\nf\nd:\ndeep\n\nd/deep:\ng\n\nd/deep/g:\nh\nfile\nown\nown\nbelow\n\
         file\nfile\nbusy\nbusy\n",
    ),
    Case(
        "cp into a container that never ran, is paused, has ended, and runs again",
        "echo given >given; docker create --init --name=states alpine sh -c 'cat /given; echo written >/written; exec sleep 3600' >created
         docker cp given states:/given; docker cp states:/etc/os-release - | tar -tf -; docker start states
         docker exec states sh -c 'until test -s /written; do sleep 0.1; done'
         docker pause states; docker cp given states:/paused; docker cp states:/written - | tar -xOf -; docker unpause states
         docker exec states cat /paused; docker stop -t 1 states; docker cp given states:/ended; docker cp states:/written - | tar -xOf -
         docker start states; docker exec states cat /ended /paused /written; docker logs states; docker rm -f states",
        "os-release\nstates\nstates\nwritten\nstates\ngiven\nstates\nwritten\nstates\ngiven\ngiven\nwritten\ngiven\ngiven\nstates\n",
    ),
    Case(
        "cp in, watched with inotify and by tail -F",
        "echo first >watched; docker run -d --name=watched debian bash -c 'echo old >/var/log/f; tail -F /var/log/f &
         exec perl -e \"\\$| = 1; \\$p = q(/srv); \\$i = syscall(253); syscall(254, \\$i, \\$p, 0x100); print qq(ready\\n); open F, q(<&=), \\$i;
         sysread F, \\$e, 4096; print qq(created ), unpack(q(x16Z*), \\$e), qq(\\n); sleep 3600\"' >started
         said() { for i in $(seq 60); do docker logs watched 2>&1 | grep -x \"$1\" && break; sleep 1; done; }
         said ready; said old; docker cp watched watched:/srv/f; docker cp watched watched:/var/log/f; said 'created f'; said first
         docker rm -f watched",
        "ready\nold\ncreated f\nfirst\nwatched\n",
    ),
    Case(
        "a user added by cp, and diff, export and commit while it runs",
        "docker run -d --init --name=adds alpine sleep 3600 >started; docker cp adds:/etc/passwd added
         echo 'newer:x:1234:100::/tmp:/bin/sh' >>added; docker cp added adds:/etc/passwd; docker exec --user=newer adds id -u
         docker exec adds sh -c 'echo own >/srv/own; rm -r /opt'; docker diff adds | grep -E ' /(srv|opt|etc/passwd)' | sort
         docker export adds | tar -xOf - srv/own; docker commit adds adds >/dev/null
         docker run --rm --user=newer adds sh -c 'id -un; cat /srv/own; ls -d /opt 2>/dev/null'
         docker rm -f adds; docker rmi adds >/dev/null",
        "1234\nA /srv/own\nC /etc/passwd\nC /srv\nD /opt\nown\nnewer\nown\nadds\n",
    ),
    Case(
        "build, BuildKit",
        "mkdir -p kit; echo x >kit/x; printf '%s\\n' 'FROM alpine AS a' 'COPY --chown=1000:100 x /x' \
         'RUN --mount=type=cache,target=/c stat -c %u:%g /x && touch /c/file && mkdir /y && chown 5:6 /y' \
         'USER 1000' 'RUN id -u && touch /tmp/mine' 'FROM alpine' 'COPY --from=a /x /y /tmp/mine /to/' \
         'COPY --from=a --chown=7:8 /x /z' >kit/Dockerfile
         DOCKER_BUILDKIT=1 docker build --no-cache --progress=plain -t kit kit >kit/log 2>&1 || tail -n 5 kit/log
         grep -oE ' [0-9.]+ (1000:100|1000)$' kit/log | awk '{ print $2 }'
         docker run --rm kit stat -c %u:%g /z /to/x; docker rmi --force kit >/dev/null",
        "1000:100\n1000\n7:8\n1000:100\n",
    ),
    Case(
        "build, BuildKit with mounts of secret, ssh, bind, cache and tmpfs",
        "mkdir -p mounts; echo bound >mounts/bound; echo hidden >token; eval $(ssh-agent) >/dev/null
         cat >mounts/Dockerfile <<'END'
FROM alpine
RUN --mount=type=secret,id=token,uid=1000 echo step secret $(stat -c %u /run/secrets/token) $(cat /run/secrets/token)
RUN --mount=type=ssh,uid=1000 test -S $SSH_AUTH_SOCK && echo step ssh $(stat -c %u $SSH_AUTH_SOCK)
RUN --mount=type=bind,target=/src echo step bind $(cat /src/bound); touch /src/x || echo step read-only
RUN --mount=type=cache,target=/c,uid=1000 echo step cache $(stat -c %u /c); touch /c/kept
RUN --mount=type=cache,target=/c,uid=1000 --mount=type=tmpfs,target=/t touch /t/x && echo step again $(ls /c) $(ls /src /run/secrets)
END
         docker buildx build --no-cache --progress=plain --secret id=token,src=token --ssh default mounts >mounts/log 2>&1 || tail -n 5 mounts/log
         sed -nE 's/^#[0-9]+ [0-9.]+ step (.*)/\\1/p' mounts/log; kill $SSH_AGENT_PID",
        "secret 1000 hidden\nssh 1000\nbind bound\nread-only\ncache 1000\nagain kept\n",
    ),
    Case(
        "the options of a node of kind, with the directory of the kernel's modules",
        "docker run -d --name=node --hostname=node --privileged --security-opt=seccomp=unconfined --security-opt=apparmor=unconfined \
             --tmpfs=/tmp --tmpfs=/run --volume=/var --volume=/lib/modules:/lib/modules:ro --tty --restart=on-failure:1 --init=false \
             --cgroupns=private --publish=127.0.0.1:0:6443/tcp alpine sleep 3600 >started
         docker exec node sh -c 'hostname; ls -A /lib/modules; touch /lib/modules/x 2>&1; mount -o remount,rw,bind /lib/modules 2>/dev/null; touch /lib/modules/x 2>&1'
         docker port node 6443/tcp | grep -c 127.0.0.1; docker rm -fv node",
        "node\ntouch: /lib/modules/x: Read-only file system\ntouch: /lib/modules/x: Read-only file system\n1\nnode\n",
    ),
    Case(
        "named volume of two containers, right owners",
        "docker run -d --init --name=one -v both:/v alpine sleep 3600 >started
         docker exec one sh -c 'echo one >/v/f; chown 1000:100 /v/f; chmod 600 /v/f; chown 1000 /v'
         docker run --rm --user=1000 -v both:/v alpine sh -c 'stat -c %u:%g /v/f; cat /v/f; echo two >>/v/f; touch /v/g'
         docker run --rm --user=1001 -v both:/v alpine cat /v/f
         docker exec one sh -c 'cat /v/f; stat -c %u:%g /v/g'; docker rm -f one; docker volume rm both",
        "1000:100\none\ncat: can't open '/v/f': Permission denied\none\ntwo\n1000:1000\none\nboth\n",
    ),
    Case(
        "anonymous volume, --volumes-from, copy-up",
        "docker run --name=from -v /home/user -v /data alpine sh -c 'touch /data/x; chown 7:8 /data/x; stat -c %u:%g /home/user'
         docker run --rm --volumes-from=from alpine stat -c %u:%g /home/user /data/x
         docker run --rm --volumes-from=from:ro alpine touch /data/y; docker rm -v from",
        "1000:1000\n1000:1000\n7:8\ntouch: /data/y: Read-only file system\nfrom\n",
    ),
    Case(
        "--read-only",
        "docker run --rm --read-only --tmpfs=/run --tmpfs=/t:size=1m,mode=1777,uid=5 -v scratch:/v alpine sh -c 'exec 2>&1
         touch /x; touch /run/x /t/y /v/z /dev/shm/s && stat -c \"%a %u\" /t; df -k /t | awk \"NR == 2 { print \\$2 }\"
         head -c 2000000 /dev/zero >/t/big 2>/dev/null || echo full'; docker volume rm scratch",
        "touch: /x: Read-only file system\n1777 5\n1024\nfull\nscratch\n",
    ),
    Case(
        "-m, --cpus, --pids-limit, --cpuset-cpus",
        "docker run --rm -m 64m --cpus=0.5 --pids-limit=50 --cpuset-cpus=0 alpine sh -c 'exec 2>&1; cd /sys/fs/cgroup; cat memory.max cpu.max pids.max cpuset.cpus; : >cgroup.procs'
         docker run --name=oom -m 32m --memory-swap=32m alpine sh -c 'head -c 200000000 /dev/zero | tail' >/dev/null 2>&1; docker inspect --format '{{.State.OOMKilled}}' oom; docker rm oom",
        "67108864\n50000 100000\n50\n0\nsh: can't create cgroup.procs: Read-only file system\ntrue\noom\n",
    ),
    Case(
        "exec, top, stats, pause, update, wait, stop",
        "docker run -d --init --name=life alpine sleep 3600 >started
         docker exec --user=1000 --workdir=/tmp --env=WORD=said life sh -c 'id -u; pwd; echo $WORD'; docker exec life sh -c 'exit 5'; echo $?
         docker exec --privileged life grep -c 'CapEff:.*1ffffffffff' /proc/self/status
         echo piped | docker exec -i life sh -c 'cat >/dev/stderr; cat </dev/stdin; echo out >/dev/stdout'
         docker top life -eo pid,comm | awk '{ print $2 }' | sort -u
         docker stats --no-stream --format '{{.Name}} {{.PIDs}} {{.MemUsage}}' life | sed 's/[0-9.]*[KM]iB .*/some/'
         docker pause life; docker inspect --format '{{.State.Status}}' life; docker unpause life
         docker update -m 48m --memory-swap=48m --pids-limit=30 life; docker exec life cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/pids.max
         docker stop life; docker wait life; docker start life; docker kill -s KILL life; docker wait life; docker rm life",
        "1000\n/tmp\nsaid\n5\n1\npiped\nout\nCOMMAND\ndocker-init\nsleep\nlife 2 some\nlife\npaused\nlife\nlife\n50331648\n30\n\
         life\n143\nlife\nlife\n137\nlife\n",
    ),
    Case(
        "--pid, --ipc, --network of another container",
        "docker run -d --init --name=owner --ipc=shareable alpine sh -c 'echo shared >/dev/shm/f; exec sleep 3600' >started; sleep 1
         docker run --rm --pid=container:owner --ipc=container:owner --network=container:owner alpine sh -c 'cat /dev/shm/f; cat /proc/1/comm; kill -0 1 && echo may; ls /proc/1/root/etc/passwd'
         docker rm -f owner",
        "shared\ndocker-init\nmay\n/proc/1/root/etc/passwd\nowner\n",
    ),
];

/// Cases of what the engine does by itself or what another case nearly shows; CI leaves their test out.
pub const MORE_CASES: &[Case] = &[
    Case(
        "cp with a read-only root and a read-only volume",
        "echo file >read-only; docker run -d --init --name=read-only --read-only -v scratch-cp:/v -v scratch-cp:/r:ro alpine sleep 3600 >started
         docker cp read-only read-only:/x 2>&1 | grep -o 'marked read-only'; docker cp read-only read-only:/r/x 2>&1 | grep -o 'marked read-only'
         docker cp read-only read-only:/v/x; docker exec read-only cat /v/x /r/x
         docker cp read-only:/etc/os-release - | tar -tf -; docker rm -f read-only; docker volume rm scratch-cp",
        "marked read-only\nmarked read-only\nfile\nfile\nos-release\nread-only\nscratch-cp\n",
    ),
    Case(
        "cp 20 times into a directory that the container writes",
        "rm -rf many; mkdir many; for i in $(seq 20); do echo $i >many/cp$i; done; : >many/last
         docker run -d --init --name=many alpine sh -c 'cd /srv; i=0; while test ! -e last; do i=$((i+1)); echo $i >own
         mv own own.$((i % 7)); done; ls | wc -l; cat cp* | sort -u | wc -l' >started
         seq 20 | xargs -P 4 -I{} docker cp many/cp{} many:/srv; docker cp many/last many:/srv; docker wait many; docker logs many; docker rm many",
        "0\n28\n20\nmany\n",
    ),
    Case(
        "export and import",
        "docker run --name=export alpine chown 1000:100 /opt
         docker export export | tar --numeric-owner -tvf - opt home/user etc/shadow | awk '{ print $1, $2, $6 }' | sort -k3
         docker export export | docker import - imported >imported; docker run --rm imported stat -c %u:%g /opt; docker rm export",
        "-rw-r----- 0/0 etc/shadow\ndrwxr-xr-x 1000/1000 home/user/\ndrwxr-xr-x 1000/100 opt/\n1000:100\nexport\n",
    ),
    Case(
        "services of a swarm with volume, secret and config",
        "docker swarm init --advertise-addr=127.0.0.1 >/dev/null; echo pass | docker secret create pass - >/dev/null; echo conf | docker config create conf - >/dev/null
         docker service create --quiet --no-resolve-image --name=service --replicas=2 --init --secret=pass --config=source=conf,target=/conf --mount=type=volume,source=common,target=/v \
             alpine sh -c 'echo $(cat /run/secrets/pass) $(stat -c %u:%a /run/secrets/pass) $(cat /conf) >>/v/f; exec sleep 3600' >created
         docker run --rm -v common:/v alpine sh -c 'until [ $(wc -l </v/f) -ge 2 ]; do sleep 1; done; cat /v/f'
         docker service rm service
         for i in $(seq 60); do [ -z \"$(docker ps -aq --filter label=com.docker.swarm.service.name=service)\" ] && break; sleep 1; done
         docker swarm leave --force; docker volume rm common",
        "pass 0:444 conf\npass 0:444 conf\nservice\nNode left the swarm.\ncommon\n",
    ),
    Case(
        "--init",
        "docker run --rm --init alpine sh -c 'cat /proc/1/comm; (sleep 0.1 &) ; sleep 1; ps -o comm | grep -c sleep'",
        "docker-init\n0\n",
    ),
    Case(
        "--ulimit, --shm-size, --hostname, --sysctl, --workdir",
        "docker run --rm --ulimit=nofile=123:456 --ulimit=core=0 --shm-size=32m --hostname=name --sysctl=net.ipv4.ip_unprivileged_port_start=80 --workdir=/made/here alpine sh -c '
         ulimit -n; ulimit -Hn; ulimit -c; df -m /dev/shm | awk \"NR == 2 { print \\$2 }\"; hostname; cat /proc/sys/net/ipv4/ip_unprivileged_port_start; pwd; stat -c %u:%g .'",
        "123\n456\n0\n32\nname\n80\n/made/here\n0:0\n",
    ),
    Case(
        "--device of what is safe in everybody's hands",
        "docker run --rm --device=/dev/zero:/dev/nought alpine sh -c 'head -c 3 /dev/nought | wc -c'
         docker run --rm --device=/dev/fuse alpine sh -c 'test -c /dev/fuse && : <>/dev/fuse && echo opened'",
        "3\nopened\n",
    ),
    Case(
        "restart policies",
        "docker run -d --restart=on-failure:2 --name=again alpine sh -c 'echo begun; exit 3' >started
         for i in $(seq 60); do [ \"$(docker inspect --format '{{.RestartCount}} {{.State.Status}}' again)\" = '2 exited' ] && break; sleep 1; done
         docker logs again; docker inspect --format '{{.RestartCount}} {{.State.Status}} {{.State.ExitCode}}' again; docker rm again",
        "begun\nbegun\nbegun\n2 exited 3\nagain\n",
    ),
    Case(
        "healthchecks",
        "docker run -d --init --name=healthy --health-cmd='test -f /tmp/ok' --health-interval=2s --health-retries=1 --health-timeout=60s alpine sleep 3600 >started
         state() { for i in $(seq 60); do s=$(docker inspect --format '{{.State.Health.Status}}' healthy); [ $s = $1 ] && break; sleep 1; done; echo $s; }
         state unhealthy; docker exec healthy touch /tmp/ok; state healthy; docker rm -f healthy",
        "unhealthy\nhealthy\nhealthy\n",
    ),
    Case(
        "volumes on servers: NFS 4.2, NFS 3 without locks, SMB",
        "docker run -d --init --name=servers servers >started
         for i in $(seq 300); do docker logs servers 2>&1 | grep -x ready && break; sleep 1; done
         address=$(docker inspect --format '{{.NetworkSettings.IPAddress}}' servers)
         volume() { docker volume create -o type=$2 -o device=$3 -o o=addr=$address,$4 $1; }
         volume four nfs :/memory nfsvers=4.2; volume three nfs :/memory nfsvers=3,port=2049,mountport=20048,soft
         volume smb cifs //$address/share username=user,password=secret,uid=1000,gid=100,file_mode=0640
         docker run -d --init --name=beside -v four:/v debian sleep 3600 >started
         docker run --rm -v four:/v alpine sh -c 'echo root >/v/root; mkdir /v/all; chmod 777 /v/all'
         docker run --rm --user=1000:100 -v four:/v alpine sh -c 'echo own >/v/all/own; chmod 640 /v/all/own; chown 5 /v/all/own'
         docker run --rm --user=2000:2000 --security-opt=seccomp=unconfined -v four:/v debian sh -c 'cat /v/all/own; unshare -Ur cat /v/all/own'
         docker exec beside sh -c 'cd /v; stat -c \"%n %u:%g %a %s\" root all/own; chown 5:6 root; chmod 604 root; flock root echo locked'
         docker run --rm -v three:/v debian sh -c 'cd /v; echo more >>all/own; stat -c \"%n %u:%g %a %s\" root all/own; flock root true 2>/dev/null || echo no lock'
         docker run --rm --user=1000:100 -v smb:/v alpine sh -c 'cd /v; echo own >own; stat -c \"%n %u:%g %a\" own; chmod 600 own; mv own mine; cat mine'
         docker run --rm --user=2000:2000 -v smb:/v alpine cat /v/mine; docker run --rm -v smb:/v alpine sh -c 'echo root >>/v/mine'
         docker exec servers sh -c 'cd /srv/share; stat -c \"%n %u\" mine; cat mine'
         docker rm -f beside; docker volume rm four three smb; docker rm -f servers",
        "ready\nfour\nthree\nsmb\nchown: /v/all/own: Operation not permitted\ncat: /v/all/own: Permission denied\n\
         cat: /v/all/own: Permission denied\nroot 0:0 644 5\nall/own 1000:100 640 4\nlocked\n\
         root 5:6 604 5\nall/own 1000:100 640 9\nno lock\nown 1000:100 640\nown\n\
         cat: can't open '/v/mine': Permission denied\nmine 1000\nown\nroot\nbeside\nfour\nthree\nsmb\nservers\n",
    ),
    Case(
        "attach, logs, terminal",
        "echo word | docker run --rm -i alpine sh -c 'cat; sleep 1; echo fault >&2; exit 42'; echo $?
         docker run --name=logs -t alpine sh -c 'tty; stat -c %u /dev/pts/0; echo x >/dev/tty' | tr -d '\\r'; docker logs logs | tr -d '\\r' | tail -n 1; docker rm logs",
        "word\nfault\n42\n/dev/pts/0\n0\nx\nx\nlogs\n",
    ),
    Case(
        "exit codes of commands that are not there",
        "docker run --rm alpine /no-such-program >/dev/null 2>&1; echo $?; docker run --rm alpine /etc/passwd >/dev/null 2>&1; echo $?
         docker run --rm -v /folder alpine nosuch 2>&1 | grep -o 'exec: .*'; docker run --rm alpine nosuch >/dev/null 2>&1; echo $?",
        "127\n126\nexec: \"nosuch\": executable file not found in $PATH: unknown.\n127\n",
    ),
    Case(
        "set-user-id programs, hard links, xattrs, fifos",
        "docker run --rm debian bash -ec '
         cp /usr/bin/id /tmp/id; chmod 4755 /tmp/id; setpriv --reuid=1000 --clear-groups /tmp/id -u; setpriv --reuid=1000 --clear-groups /tmp/id -ru
         ln /tmp/id /tmp/id2; stat -c %h /tmp/id; mkfifo /tmp/p; (echo fifo >/tmp/p &); cat /tmp/p; chown -h 5:6 /var/run; stat -c %u:%g /var/run
         mkdir /tmp/r; mv /usr/share/common-licenses /tmp/r/; ls -d /tmp/r/*'",
        "0\n1000\n2\nfifo\n5:6\n/tmp/r/common-licenses\n",
    ),
    Case(
        "commit",
        "docker run --name=commit alpine sh -c 'echo data >/f; chown 1000:100 /f; chmod 4755 /f; mkdir /home/user/d; rm -r /opt'
         docker commit commit committed >/dev/null
         docker run --rm committed sh -c 'exec 2>&1; stat -c \"%u:%g %a %s\" /f; ls -d /home/user/d; ls /opt'; docker rm commit",
        "1000:100 4755 5\n/home/user/d\nls: /opt: No such file or directory\ncommit\n",
    ),
    Case(
        "cp in, ownership kept, while it runs",
        "docker run -d --init --name=in alpine sleep 3600 >started; mkdir -p pack; echo in >pack/f
         tar --owner=1000 --group=100 --mode=604 -C pack -cf - f | docker cp --archive - in:/tmp
         docker exec in stat -c '%u:%g %a %s' /tmp/f
         docker exec in sh -c 'echo more >>/tmp/f'; docker cp in:/tmp/f - | tar -xOf -
         docker exec --user=1000 in sh -c 'echo mine >>/tmp/f && tail -n 1 /tmp/f'; docker rm -f in",
        "1000:100 604 3\nin\nmore\nmine\nin\n",
    ),
    Case(
        "diff",
        "docker run --name=diff alpine sh -c 'echo new >/new; mkdir /srv/d; rm /etc/os-release; chown 1000 /opt'
         docker diff diff | sort; docker rm diff",
        "A /new\nA /srv/d\nC /etc\nC /opt\nC /srv\nD /etc/os-release\ndiff\n",
    ),
    Case(
        "build, classic",
        "mkdir -p classic; echo x >classic/x; printf '%s\\n' 'FROM alpine' 'COPY --chown=1000:100 x /x' \
         'RUN stat -c %u:%g /x && mkdir /y && chown 5:6 /y' 'USER 1000' 'RUN id -u && touch /tmp/mine' >classic/Dockerfile
         DOCKER_BUILDKIT=0 docker build --no-cache -t classic classic 2>/dev/null | grep -xE '[0-9]+(:[0-9]+)?'
         docker run --rm classic stat -c %u:%g /x /y /tmp/mine; docker rmi --force classic >/dev/null",
        "1000:100\n1000\n1000:100\n5:6\n1000:1000\n",
    ),
    Case(
        "a volume in a volume, read-only beside writable",
        "docker run --rm -v outer:/a -v inner:/a/b -v outer:/r:ro alpine sh -c 'exec 2>&1; touch /a/x /a/b/y; ls /r; touch /r/z'
         docker run --rm -v outer:/a alpine ls -R /a; docker volume rm outer inner",
        "b\nx\ntouch: /r/z: Read-only file system\n/a:\nb\nx\n\n/a/b:\nouter\ninner\n",
    ),
    Case(
        "--user, groups, new files",
        "docker run --rm --user=1000:100 --group-add=5 -v users:/v alpine sh -c 'exec 2>&1; id -u; id -g; grep Groups /proc/self/status; touch /tmp/f; stat -c %u:%g /tmp/f; touch /etc/x'
         docker run --rm --user=user alpine sh -c 'id -un; touch /home/user/f && stat -c %u:%g /home/user/f'
         docker volume rm users",
        "1000\n100\nGroups:\t5 100 \n1000:100\ntouch: /etc/x: Permission denied\nuser\n1000:1000\nusers\n",
    ),
    Case(
        "--cap-add, --cap-drop",
        "docker run --rm alpine grep CapEff /proc/self/status; docker run --rm --cap-add=NET_ADMIN alpine sh -c 'grep CapEff /proc/self/status; ip link set lo mtu 1000 && cat /sys/class/net/lo/mtu'
         docker run --rm --cap-drop=ALL alpine sh -c 'grep -E \"Cap(Eff|Bnd)\" /proc/self/status'
         docker run --rm --user=1000 alpine grep CapEff /proc/self/status",
        "CapEff:\t00000000a80425fb\nCapEff:\t00000000a80435fb\n1000\nCapEff:\t0000000000000000\nCapBnd:\t0000000000000000\nCapEff:\t0000000000000000\n",
    ),
    Case(
        "--security-opt",
        "echo '{\"defaultAction\":\"SCMP_ACT_ALLOW\",\"syscalls\":[{\"names\":[\"mkdir\",\"mkdirat\"],\"action\":\"SCMP_ACT_ERRNO\"}]}' >no-mkdir.json
         docker run --rm --security-opt=no-new-privileges --security-opt=seccomp=no-mkdir.json alpine sh -c 'exec 2>&1; grep NoNewPrivs /proc/self/status; grep Seccomp: /proc/self/status; mkdir /x'
         docker run --rm alpine grep Seccomp: /proc/self/status
         docker run --rm --security-opt=systempaths=unconfined alpine sh -c 'mount | grep -v fuse.bulkhead | grep -c \"on /proc/\"'",
        "NoNewPrivs:\t1\nSeccomp:\t2\nmkdir: can't create directory '/x': Operation not permitted\nSeccomp:\t2\n0\n",
    ),
];

/// Cases that are not as with runc yet with isolation on, and why.
pub const LATER: &[(&str, &str)] = &[(
    "exit codes of commands that are not there",
    "125: crun says `No such file or directory`, and docker's command looks for runc's `no such file or directory`",
)];

/// The usual calls of docker-py, the Docker SDK for Python.
pub const DOCKER_PY: Case = Case(
    "docker-py",
    concat!(
        "cat >docker_py.py <<'SCRIPT'\n",
        include_str!("docker_py.py"),
        "\nSCRIPT\nDOCKER_HOST=unix://$SOCKET python3 docker_py.py"
    ),
    "engine\nrunning_container\nnetworks\nvolumes\nbuild_and_events\npassed\n",
);
