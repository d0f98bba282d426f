#!/bin/sh
# Proves on a booted Debian 12 without internet what a bundle promises: install, isolation, upgrade under load, rollback,
# kill -9 at any moment, repair, uninstall.
#
#   sh bench/airgap/install.sh WORK [STAGE...]
#
# Root, on Debian 12 with a package mirror, which makes the tree of the machine; it installs what it needs itself. WORK
# has first.tar and next.tar, two versions of one key with reference-26m, the second may be a delta on the first.
# Stages, all unless some are given, each going on from the one before: fresh guide install look cycles kills repair
# remove; guide runs the commands of docs/operator.md and leaves nothing.
# The machine is a systemd-nspawn in a network namespace that has lo and one wire to a second namespace, where the
# clients are; no route leads on. CYCLES (50), UPGRADE_KILLS (25) and INSTALL_KILLS (10) say how often; SEED (0) when kills
# come, so that a run may go on with the seeds after those of the run before. Prints a table; exit status 0 when all of it
# is ok. Both namespaces, the machine and its load end with the script; WORK/tree stays.
set -eu
export LC_ALL=C

here=$(cd "$(dirname "$0")" && pwd)
work=$(cd "${1:?give the folder with first.tar and next.tar}" && pwd)
shift
tree=$work/tree room=vashista-room client=vashista-client address=192.0.2.10:8000 lan=192.0.2.10
failed=0

row() { printf '%-7s %-62s %s\n' "$1" "$2" "$3" | tee -a "$work/table.txt"; [ "$1" = ok ] || failed=1; }
claim() { # words, command that must hold; its last line is shown where it does not
    words=$1
    shift
    if "$@" >"$work/claim.log" 2>&1; then row ok "$words" "${figure:-}"; else row "NOT OK" "$words" "$(tail -n 1 "$work/claim.log")"; cat "$work/claim.log" >>"$work/failures.log"; fi
    figure=
}
at_most() { awk -v found="$1" -v limit="$2" 'BEGIN { exit !(found <= limit) }'; }
now() { date +%s.%N; }
since() { awk -v from="$1" -v to="${2:-$(now)}" 'BEGIN { printf "%.1f", to - from }'; }
inside() { nsenter --target "$leader" --mount --uts --ipc --net --pid --cgroup "$@"; }
run() { inside sh -c "cd /root && $1"; }
asks() { ip netns exec $client python3 -I "$here/install_client.py" "$@"; }
random() { awk -v seed="$1" -v most="$2" 'BEGIN { srand(seed); rand(); printf "%.2f", rand() * most }'; }

# --- the machine ----------------------------------------------------------------------------------------------------

need() {
    for pair in mmdebstrap:mmdebstrap systemd-nspawn:systemd-container ip:iproute2 openssl:openssl python3:python3; do
        command -v "${pair%:*}" >/dev/null || apt-get install --yes --quiet "${pair#*:}"
    done
}

wire() {
    ip netns add $room
    ip netns add $client
    ip link add lan0 netns $room type veth peer name lan0 netns $client
    ip -n $room address add $lan/24 dev lan0
    ip -n $client address add 192.0.2.20/24 dev lan0
    for name in $room $client; do ip -n $name link set lo up; ip -n $name link set lan0 up; done
}

boot() {
    wire
    systemd-nspawn --quiet --directory "$tree" --boot --register=no --keep-unit --machine=vashista-room \
        --network-namespace-path=/run/netns/$room --capability=CAP_NET_ADMIN --bind-ro="$work:/media/usb" \
        --console=pipe </dev/null >"$work/boot.log" 2>&1 &
    nspawn=$!
    for _ in $(seq 100); do
        leader=$(pgrep -P $nspawn || true)
        [ -z "$leader" ] || case $(inside systemctl is-system-running 2>/dev/null) in running | degraded) return 0 ;; esac
        sleep 0.3
    done
    tail "$work/boot.log" >&2
    exit 1
}

end() {
    touch "$work/end"
    [ -z "${leader:-}" ] || kill -s RTMIN+4 "$leader" 2>/dev/null || true
    [ -z "${nspawn:-}" ] || wait $nspawn || true
    for name in $room $client; do ip netns delete $name 2>/dev/null || true; done
}

files() { # of the machine but for what every machine writes while it runs; /etc by content
    run 'find / -xdev \( -path /proc -o -path /sys -o -path /dev -o -path /run -o -path /tmp -o -path /var/tmp -o -path /root \
        -o -path /media -o -path /var/log -o -path /var/lib/systemd -o -path /var/cache/ldconfig \) -prune -o -print | sort
        find /etc -type f ! -name "*-" ! -name machine-id ! -name .updated ! -name .pwd.lock -exec sha256sum {} + | sort'
}

# --- stages ---------------------------------------------------------------------------------------------------------

fresh() {
    rm -rf "$tree" "$work/before" "$work/table.txt" "$work/failures.log"
    [ -f "$work/debian.tar" ] || mmdebstrap --variant=minbase \
        --include=systemd,systemd-sysv,dbus,openssl,curl,procps,iproute2 bookworm "$work/debian.tar"
    mkdir "$tree"
    tar -xf "$work/debian.tar" -C "$tree"
}

unpack() { # on the machine: both bundles, as from a medium
    run 'rm -rf first next && mkdir first next
        tar -xf /media/usb/first.tar -C first --strip-components 1 && tar -xf /media/usb/next.tar -C next --strip-components 1'
    fingerprint=$(run 'cat first/signature/ecdsa.pem first/signature/mldsa.pem | sha256sum | cut -d " " -f 1')
}

guide() { # the boxes of docs/operator.md in one shell; the auditor's python3 is the bundle's, the tree has none
    sed -n '/^```sh$/,/^```$/p' "$here/../../docs/operator.md" | sed -e '/^```/d' -e "s/FINGERPRINT/$fingerprint/" \
        -e 's|usb/vashista-[0-9.]*-cpu.tar|usb/first.tar|; s|usb/vashista-[0-9.]*-cpu-delta.tar|usb/next.tar|' \
        -e "s|^vashista keys create alice|key=\$(&)|; s|'\(Authorization: Bearer \)KEY'|\"\1\$key\"|" \
        -e 's|^python3 |/opt/vashista/current/bin/python -P |' >"$work/guide.sh"
    figure="$(grep -c '^[a-z(]' "$work/guide.sh") commands"
    claim "docs/operator.md, command by command" run 'PS4="guide: " sh -eux /media/usb/guide.sh'
    cp "$work/claim.log" "$work/guide.log"
    run 'rm -rf /root/vashista* /root/attestation.json /root/parts /root/ledger.pub /var/lib/vashista'
}

install() {
    files >"$work/before"
    claim "the machine has no route out" run '[ -z "$(ip route show default)$(ip -6 route show default)" ]'
    claim "by hand: the signature is good" run 'cd first &&
        (cat MANIFEST; sha256sum signature/mldsa.sig) | openssl dgst -sha384 -verify signature/ecdsa.pem -signature signature/ecdsa.sig'
    claim "by hand: every file is as it was signed" run "cd first && sed -n 's/^file \([0-9a-f]*\) [0-9]* /\1  /p' MANIFEST | sha256sum --check --quiet"
    claim "sh install.sh without a fingerprint is refused" run '! sh first/install.sh'
    claim "sh install.sh verify" run "sh first/install.sh verify --fingerprint $fingerprint"
    files | diff "$work/before" - >"$work/claim.log" && row ok "nothing was written until now" "" || row "NOT OK" "nothing was written until now" ""
    asks first $address >"$work/first.json" &
    asking=$!
    from=$(now)
    claim "sh install.sh --fingerprint HEX" run "sh first/install.sh --fingerprint $fingerprint"
    seconds=$(since "$from")
    wait $asking || true
    first_s=$(since "$from" "$(sed -n 's/.*"at": \([0-9.]*\).*/\1/p' "$work/first.json")")
    figure="$first_s s; install.sh ended after $seconds s"
    claim "first completion over the LAN after at most 90 s" at_most "$first_s" 90
}

look() {
    claim "vashista-setup status" run 'vashista-setup status'
    claim "vashista-setup check" run 'vashista-setup check'
    claim "vashista selftest" run 'vashista selftest'
    claim "the unit serves with isolation=required" run \
        'tr "\0" "\n" </proc/$(systemctl show --property MainPID --value vashista.service)/environ | grep -x VASHISTA_ISOLATION=required'
    run 'vashista doctor --pid $(systemctl show --property MainPID --value vashista.service)' >"$work/doctor.txt" 2>&1 || true
    for line in isolation "network filter" rights; do claim "vashista doctor: $line" grep "^ok  *$line " "$work/doctor.txt"; done
    claim "vashista attest write: the bill of materials is in it" run 'vashista attest write /root/look.json &&
        vashista attest verify /root/look.json | grep "^sbom  */opt/vashista/.*SHA-256" && rm /root/look.json'
    claim "vashista doctor: nothing is not ok" sh -c "! grep '^NOT OK' '$work/doctor.txt'"
    exposure=$(run 'systemd-analyze security --no-pager vashista.service' | sed -n 's/.*exposure level for vashista.service: \([0-9.]*\).*/\1/p')
    figure=$exposure
    claim "systemd-analyze security vashista.service is at most 1.0" at_most "${exposure:-10}" 1.0
    claim "systemctl is-enabled vashista.service vashista.socket" run 'systemctl is-enabled vashista.service vashista.socket'
    claim "metrics for Prometheus" run 'curl --fail --silent http://127.0.0.1:8000/metrics | grep vashista_engine_ready'
}

load() { rm -f "$work/end"; asks load $address "$work/end" >"$work/load.json" & loading=$!; }
unload() { touch "$work/end"; wait $loading; }

cycles() {
    run 'vashista keys create alice' >/dev/null
    run 'vashista keys open --yes && sleep 2' >/dev/null # a running server obeys within a second
    before=$(run 'vashista ledger export | wc -l')
    load
    slowest=0 done=0
    while [ $done -lt "${CYCLES:-50}" ]; do
        if [ $((done % 2)) = 0 ]; then
            run 'sh next/install.sh' >"$work/cycle.log" 2>&1 || row "NOT OK" "upgrade $done" "$(tail -n 1 "$work/cycle.log")"
        else
            from=$(now)
            run 'vashista-setup rollback' >"$work/cycle.log" 2>&1 || row "NOT OK" "rollback $done" "$(tail -n 1 "$work/cycle.log")"
            seconds=$(since "$from")
            at_most "$seconds" "$slowest" || slowest=$seconds
        fi
        done=$((done + 1))
    done
    unload || true
    figure=$(cat "$work/load.json")
    claim "$done upgrades and rollbacks under load: 0 refused, 0 lost" grep '"refused": 0, "lost": 0' "$work/load.json"
    figure="slowest $slowest s, under load"
    claim "vashista-setup rollback takes at most 10 s" at_most "$slowest" 10
    after=$(run 'vashista ledger export | wc -l')
    asked=$(sed -n 's/.*"requests": \([0-9]*\).*/\1/p' "$work/load.json")
    figure="$before + $asked <= $after"
    claim "the ledger has every request" [ $((before + asked)) -le "$after" ]
    claim "vashista ledger verify" run 'vashista ledger verify'
}

killed() { # command on the machine: kill it within $most_s, all its processes or the shell alone by turns; fails if it had ended
    started=$(now)
    setsid sh -c 'nsenter --target "$0" --mount --uts --ipc --net --pid --cgroup sh -c "cd /root && exec $1"; date +%s.%N >"$2"' \
        "$leader" "$1" "$work/ended" >"$work/killed.log" 2>&1 &
    victim=$! seed=$((seed + 1)) came=yes
    sleep "$(random "$seed" "$most_s")"
    if [ $((seed % 2)) = 0 ]; then kill -KILL -- "-$victim" 2>/dev/null; else pkill -KILL -s $victim -x sh 2>/dev/null; fi || came=
    wait $victim 2>/dev/null || true
    [ -z "$came" ] || return 0
    late=$((late + 1)) took_s=$(since "$started" "$(cat "$work/ended")")
    at_most "$most_s" "$took_s" || most_s=$took_s
    return 1
}

again() { # the next run, which waits while processes of the killed one still live
    for _ in $(seq 60); do
        if run "$1" >"$work/again.log" 2>&1; then break; fi
        grep -q 'Another setup runs' "$work/again.log" || break
        sleep 1
    done
    run 'vashista-setup check' >>"$work/again.log" 2>&1 && asks first $address >>"$work/again.log" 2>&1
}

other() { # makes the version that is not current unknown to the machine, and names its bundle: to
    run 'systemctl is-active --quiet vashista || vashista-setup rollback; rm -rf $(readlink -f /opt/vashista/previous)' >/dev/null 2>&1
    to=next; ! run 'vashista-setup status' | grep -q '^current *0.1.1' || to=first
}

kills() {
    seed=${SEED:-0} late=0 whole=0 tried=0
    other
    from=$(now)
    run "sh $to/install.sh" >"$work/again.log" 2>&1
    most_s=$(since "$from")
    while [ $tried -lt "${UPGRADE_KILLS:-25}" ]; do
        other
        killed "sh $to/install.sh" || continue
        tried=$((tried + 1)) held=no
        ! run 'vashista-setup check' >"$work/held.log" 2>&1 || held=yes
        again "sh $to/install.sh" && [ $held = yes ] && whole=$((whole + 1)) || { echo "upgrade, seed $seed, held $held"; cat "$work/held.log" "$work/again.log"; } >>"$work/failures.log"
    done
    figure="$whole of $tried, and $late that had ended before; seeds to $seed"
    claim "upgrades killed: a whole version stays, the next run finishes" [ "$whole" = "$tried" ]
    claim "vashista ledger verify after the kills" run 'vashista ledger verify'

    late=0 whole=0 tried=0
    run 'vashista-setup uninstall --purge' >/dev/null 2>&1
    from=$(now)
    run "sh first/install.sh --fingerprint $fingerprint" >"$work/again.log" 2>&1
    most_s=$(since "$from")
    while [ $tried -lt "${INSTALL_KILLS:-10}" ]; do
        run 'vashista-setup uninstall --purge' >/dev/null 2>&1
        killed "sh first/install.sh --fingerprint $fingerprint" || continue
        tried=$((tried + 1))
        again "sh first/install.sh --fingerprint $fingerprint" && whole=$((whole + 1)) || { echo "install, seed $seed"; cat "$work/again.log"; } >>"$work/failures.log"
    done
    figure="$whole of $tried, and $late that had ended before; seeds to $seed"
    claim "first installations killed: the next run finishes" [ "$whole" = "$tried" ]
}

repair() {
    from=first; ! run 'vashista-setup status' | grep -q '^current *0.1.1' || from=next
    packages=/opt/vashista/current/lib/python3.11/site-packages
    run "echo 'evil = 1' >>$packages/vashista/server/cli.py; rm /etc/systemd/system/vashista.socket"
    claim "vashista-setup check names a changed file" run '! vashista-setup check 2>damage && grep vashista/server/cli.py damage'
    claim "sh install.sh repair" run "sh $from/install.sh repair"
    run "echo 'evil = 1' >$packages/sitecustomize.py"
    claim "vashista-setup check names a file that was added" run '! vashista-setup check 2>damage && grep sitecustomize.py damage'
    claim "sh install.sh repair" run "sh $from/install.sh repair"
    claim "vashista-setup check after it" run 'vashista-setup check'
    claim "it answers after it" asks first $address
}

remove() {
    claim "vashista-setup uninstall" run 'vashista-setup uninstall'
    files >"$work/after"
    left=$(diff "$work/before" "$work/after" | sed -n 's/^[<>] //p' | grep -v '^/var/lib/vashista' || true)
    figure="kept: $(run 'ls /var/lib/vashista' | paste -sd ' ' -)"
    claim "it leaves the state folder and nothing else" sh -c "[ -z '$left' ] || { echo '$left'; false; }"
    claim "no process of it runs" run '! pgrep -f "[/]opt/vashista"'
    claim "installed again, the ledger goes on" run "sh first/install.sh --fingerprint $fingerprint && vashista ledger verify"
    claim "vashista-setup uninstall --purge" run 'vashista-setup uninstall --purge'
    files >"$work/after"
    claim "it leaves nothing" diff "$work/before" "$work/after"
}

[ "$(id -u)" = 0 ] || { echo "install.sh: run it as root" >&2; exit 1; }
stages=${*:-fresh guide install look cycles kills repair remove}
need
case $stages in fresh*) fresh ;; esac
trap end EXIT
boot
unpack
for stage in $stages; do [ "$stage" = fresh ] || "$stage"; done
exit $failed
