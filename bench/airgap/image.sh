#!/bin/sh
# Builds the CPU image twice from a bundle in a network with nothing but lo, loads it with podman, and has it answer with
# no network, a read-only root and no rights: through a Unix socket that is mounted in, then through a listening TCP
# socket that it is handed (socket activation); and as docker/kubernetes.yaml says, where podman can play that.
#
#   sh bench/airgap/image.sh WORK BUNDLE    WORK is a folder to work in, BUNDLE a whole one with reference-26m; root
#
# Prints a line of evidence for each claim; exit status 0 when all hold. TWICE=no builds once. PODMAN overrides how podman
# is called; the default suits machines without systemd, where the limits and cgroups of podman's own default fail.
set -eu
export PYTHONSAFEPATH=1

root=$(cd "$(dirname "$0")/../.." && pwd)
mkdir -p "$1"
work=$(cd "$1" && pwd)
podman=${PODMAN:-podman --cgroup-manager cgroupfs --runtime runc}
python=${PYTHON:-python3.11}
bundle=$work/bundle
model=$bundle/models/reference-26m
name=vashista-image-check
port=${PORT:-8471}
# No network, no rights, nothing writable but state and socket.
flags="--name $name --network none --read-only --cap-drop all --security-opt no-new-privileges --user 65532:65532
    --ulimit nofile=20000:20000 --ulimit nproc=20000:20000 --tmpfs /tmp
    --volume $work/state:/var/lib/vashista --volume $model:/models/model:ro
    --env VASHISTA_NUM_THREADS=1 --env VASHISTA_KV_CACHE_BYTES=256MiB"
failed=0

claim() { # words, then the command that must hold
    words=$1
    shift
    if "$@" >"$work/claim.out" 2>&1; then echo "ok      $words"; else echo "NOT OK  $words"; cat "$work/claim.out"; failed=1; fi
}
refused() { ! "$@"; }
end() {
    $podman rm --force --ignore --time 5 $name $name-proxy >/dev/null 2>&1 || true
    $podman pod rm --force --ignore --time 5 vashista-pod-0 >/dev/null 2>&1 || true
    $podman volume rm --force vashista-state vashista-models run tmp probe >/dev/null 2>&1 || true
    $podman network rm --force vashista-image-check >/dev/null 2>&1 || true
    rm -rf "$work/run" "$work/state" "$work/claim.out"
}
trap end EXIT

build() { # file
    unshare --net "$python" "$bundle/image/docker/build.py" cpu --wheels "$bundle/wheels" \
        --packages "$bundle/image/packages" --product "$(ls "$bundle"/product/*.whl)" --out "$work/$1"
}
ask() { # curl's flags, address
    curl --silent --fail --max-time 30 "$@/v1/completions" --header 'content-type: application/json' \
        --data '{"model":"model","prompt":"It was a dark and stormy night","max_tokens":8,"temperature":0}'
}
answers() { ask "$@" | grep '"completion_tokens":8'; }
inside() { $podman exec $name /usr/bin/python3.11 -c "$1"; }
vashista() { $podman exec $name /usr/bin/python3.11 -P /usr/bin/vashista "$@"; }
await() { # curl's flags, address: at most a minute
    for _ in $(seq 240); do
        curl --silent --fail --max-time 5 "$@/ready" >/dev/null && return
        sleep 0.25
    done
    $podman logs $name
    return 1
}
fresh() { end; mkdir -p "$work/run" "$work/state"; chown 65532:65532 "$work/run" "$work/state"; }

rm -rf "$work/podman.log" "$bundle"
mkdir "$bundle"
tar -xf "${2:?give the bundle}" -C "$bundle" --strip-components 1
from=$(date +%s)
build a.tar
echo "        $(stat -c %s "$work/a.tar") bytes in $(($(date +%s) - from)) s"
if [ "${TWICE:-yes}" = yes ]; then
    build b.tar >/dev/null
    claim "built twice, the same bytes" cmp "$work/a.tar" "$work/b.tar"
    rm "$work/b.tar"
fi
claim "podman loads the plain tar" $podman load --input "$work/a.tar"
image=$(tar -xOf "$work/a.tar" manifest.json | sed 's/.*"RepoTags":\["\([^"]*\)".*/\1/')

fresh
# shellcheck disable=SC2086
$podman run $flags --detach --volume "$work/run:/run/vashista" "$image" >/dev/null 2>>"$work/podman.log"
claim "ready behind a mounted Unix socket" await --unix-socket "$work/run/vashista.sock" http://localhost
claim "answers a completion" answers --unix-socket "$work/run/vashista.sock" http://localhost
claim "its health check passes" $podman exec $name /usr/bin/python3.11 -I /usr/lib/vashista/health.py
claim "its health check fails without a server" refused \
    $podman exec $name /usr/bin/python3.11 -I /usr/lib/vashista/health.py /tmp/none
claim "runs as user 65532" inside 'import os; assert os.getuid() == os.getgid() == 65532'
$podman run --name $name-proxy --detach --network host --read-only --cap-drop all --user 65532:65532 \
    --ulimit nofile=20000:20000 --ulimit nproc=20000:20000 --volume "$work/run:/run/vashista:ro" \
    --entrypoint '["/usr/bin/python3.11", "-I", "/usr/lib/vashista/forward.py"]' --health-cmd none \
    "$image" "127.0.0.1:$port" /run/vashista/vashista.sock >/dev/null 2>>"$work/podman.log"
claim "the proxy of the compose file is ready" await "http://127.0.0.1:$port"
claim "answers a completion through it" answers "http://127.0.0.1:$port"
$podman rm --force --time 5 $name-proxy >/dev/null 2>>"$work/podman.log"
claim "has no interface but lo" inside 'import os; assert os.listdir("/sys/class/net") == ["lo"]'
claim "has no capabilities" inside \
    'import re; s = open("/proc/1/status").read(); assert not any(int(c, 16) for c in re.findall(r"Cap...:\t(\w+)", s)), s'
claim "cannot connect out" inside '
import socket
for family, address in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
    try: socket.create_connection((address, 443), 2)
    except OSError as error: print(error)
    else: raise SystemExit("connected")'
claim "has no shell" refused $podman exec $name /bin/sh -c true
claim "cannot write its root" refused inside 'open("/usr/x", "w")'
claim "lists its packages in an SBOM" inside '
import hashlib, json, os
bill = json.load(open("/usr/share/vashista/sbom.cdx.json"))
names = {part["name"] for part in bill["components"]}
assert {"torch", "vashista", "libc6", "python3.11-minimal"} <= names, names
assert all(part["hashes"] and part["purl"] for part in bill["components"])'
claim "vashista doctor finds nothing wrong in it" vashista doctor
claim "vashista attest write signs that" vashista attest write /var/lib/vashista/attestation.json
claim "the standard library verifies it" \
    "$python" "$root/deploy/verify_attestation.py" "$work/state/attestation.json" --key "$work/state/ledger.pub"
claim "ends within ten seconds when asked" timeout 10 $podman stop --time 10 $name

fresh
# shellcheck disable=SC2086
# What systemd does for a socket unit: listen, then start podman with the socket as descriptor 3.
"$python" -c '
import os, socket, sys
listener = socket.create_server(("127.0.0.1", int(sys.argv[1])))
os.dup2(listener.fileno(), 3)
os.set_inheritable(3, True)
os.environ |= {"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid())}
os.execvp(sys.argv[2], sys.argv[2:])' "$port" sh -c 'LISTEN_PID=$$; export LISTEN_PID; exec "$@"' sh \
    $podman run $flags --health-cmd none "$image" serve --fd 3 >>"$work/podman.log" 2>&1 &
claim "ready behind an inherited TCP socket" await "http://127.0.0.1:$port"
claim "answers a completion through it" answers "http://127.0.0.1:$port"
claim "has no interface but lo there too" inside 'import os; assert os.listdir("/sys/class/net") == ["lo"]'

# docker/kubernetes.yaml, played by podman, which knows neither policies nor optional secrets, publishes every port, and
# takes its limits from a file: an internal network stands for the policy.
fresh
lan=198.51.100.0/24
sed -e "s|192\.0\.2\.0/24|$lan|; s|^          secret: .*|          emptyDir: {}|; /^          ports:\$/d; /containerPort/d" \
    "$bundle/image/docker/kubernetes.yaml" >"$work/kubernetes.yaml"
printf '[containers]\ndefault_ulimits = ["nofile=20000:20000", "nproc=20000:20000"]\n' >"$work/containers.conf"
export CONTAINERS_CONF="$work/containers.conf"
pod=vashista-pod-0 name=vashista-pod-0-vashista
claim "podman plays docker/kubernetes.yaml" eval \
    "$podman network create --internal --subnet $lan vashista-image-check && $podman kube play --network vashista-image-check --start=false $work/kubernetes.yaml"
cp -R "$model" "$($podman volume inspect --format '{{.Mountpoint}}' vashista-models)/model"
$podman pod start $pod >>"$work/podman.log" 2>&1 || true
address=$($podman inspect --format '{{(index .NetworkSettings.Networks "vashista-image-check").IPAddress}}' "$($podman pod inspect --format '{{.InfraContainerID}}' $pod)")
claim "ready at its own address" await "http://$address:8000"
claim "answers a completion there" answers "http://$address:8000"
health="$podman exec $name /usr/bin/python3.11 -I /usr/lib/vashista/health.py http://127.0.0.1:8000"
claim "its startup and liveness probe passes" $health /health
claim "its readiness probe passes" $health /ready /run/probe/key
key=$($podman exec $name /usr/bin/python3.11 -P /usr/bin/vashista keys create probe --role metrics 2>>"$work/podman.log")
sleep 2
claim "once there is a key, it needs one to be ready" refused $health /ready /run/probe/key
echo "$key" >"$($podman volume inspect --format '{{.Mountpoint}}' probe)/key"
claim "with the key it is" $health /ready /run/probe/key
claim "has no capabilities there" inside \
    'import re; s = open("/proc/1/status").read(); assert not any(int(c, 16) for c in re.findall(r"Cap...:\t(\w+)", s)), s'
claim "has the filter of the runtime and its own" inside \
    'import re; n = int(re.search(r"Seccomp_filters:\t(\d+)", open("/proc/1/status").read())[1]); assert n >= 2, n'
claim "cannot write its root there" refused inside 'open("/usr/x", "w")'
claim "cannot write the model" refused inside 'open("/models/model/x", "w")'
claim "says that its isolation is lan" eval \
    "curl --silent --fail --header 'Authorization: Bearer $key' http://$address:8000/metrics | grep 'vashista_isolation{mode=\"lan\"} 1'"
exit $failed
