#!/bin/sh
# Installs, upgrades, rolls back and removes Vashista. install.sh runs it after it has checked the bundle; installed as
# vashista-setup it needs no bundle:
#
#   vashista-setup status               what is installed and whether it runs
#   vashista-setup check                compare every installed file with what was installed
#   vashista-setup rollback             go back to the version before; ledger, keys and settings stay
#   vashista-setup uninstall [--purge]  remove everything but ledger, keys, your own models and files; --purge removes all
#
# In /opt/vashista: runtimes/ID (Python and its packages), versions/NAME (the product), links `current` and `previous`.
# Python is the bundle's own, with its own libc; nothing of the system's is replaced. Whatever setup makes is made aside
# and renamed; a run that is killed leaves a whole old or a whole new version, and the next run finishes. The file `unfinished` names the version that a killed run was about to start.
set -eu
umask 022
export LC_ALL=C
PATH=$PATH:/usr/sbin:/sbin

say() { echo "setup: $*"; }
die() { echo "setup: $1" >&2; shift; for line in "$@"; do echo "       $line" >&2; done; exit 1; }

read_arguments() {
    verb=${1:-status} medium='' manifest_sha='' root='' mldsa='' purge=''
    [ $# -eq 0 ] || shift
    while [ $# -gt 0 ]; do
        case $1 in
            --medium) medium=$2; shift 2 ;;
            --manifest) manifest_sha=$2; shift 2 ;;
            --root) root=$2; shift 2 ;;
            --check-mldsa) mldsa=yes; shift ;;
            --purge) purge=yes; shift ;;
            *) die "$1 is not known; see the head of $0." ;;
        esac
    done
    opt=$root/opt/vashista etc=$root/etc/vashista state=$root/var/lib/vashista models=$root/srv/vashista/models
    cache=$root/var/cache/vashista units=$root/etc/systemd/system staging=$opt/staging
    live=; [ -n "$root" ] || [ ! -d /run/systemd/system ] || live=yes
}

# --- small things ---------------------------------------------------------------------------------------------------

sum() { sha256sum | cut -d ' ' -f 1; }
put() { cat >"$1.new" && chmod "$2" "$1.new" && mv -f "$1.new" "$1"; } # path, mode: stdin becomes the file, whole or not at all
point() { ln -sfn "$2" "$1.new" && mv -fT "$1.new" "$1"; }             # link, target
target() { readlink "$opt/$1" 2>/dev/null | sed 's|^versions/||'; }    # current or previous
field() { sed -n "s/^$1 //p" "$staging/MANIFEST"; }
listed() { sed -n 's/^file \([0-9a-f]\{64\}\) [0-9]* /\1  /p' "$staging/MANIFEST" | sed -n "s|  $1|  |p"; } # sums below a path
is_intact() { (cd "$1" 2>/dev/null && sha256sum --check --quiet --strict FILES >/dev/null 2>&1 && [ -z "$(added)" ]); }
added() { # files and links here that FILES does not name: Python would load some without being asked
    { sed 's/^.\{66\}//' FILES; find . ! -type d ! -path ./FILES ! -path ./runtime | sed 's|^\./||'; } | sort | uniq -u
}
owner() { if [ -f "$root/etc/passwd" ]; then sed -n 's/^vashista:[^:]*:\([0-9]*\):\([0-9]*\):.*/\1:\2/p' "$root/etc/passwd"; fi; }
service() { [ -z "$live" ] || systemctl "$@"; }
is_running() { [ -n "$live" ] && systemctl is-active --quiet vashista.service; }

take() { # a file of the medium into staging, checked as it now lies there
    cp "$medium/$1" "$staging/${1##*/}"
    [ "$(sum <"$staging/${1##*/}")" = "$(listed "$1\$" | cut -d ' ' -f 1)" ] || die "$1 changed on the medium while it was read."
}

python() { # of the runtime in folder $1; the rest are its arguments
    lib=$1/usr/lib/x86_64-linux-gnu program=$1/usr/bin/python3.11
    shift
    "$lib/ld-linux-x86-64.so.2" --argv0 "$program" --library-path "$lib" "$program" -I -B "$@"
}
unpack() { python "$runtime" "$staging/unpack.py" "$@" --manifest "$staging/MANIFEST" --medium "$medium"; }

swap() { # staged folder $1 to its place $2, the damaged one that may lie there aside
    [ ! -d "$2" ] || mv "$2" "$staging/damaged-${2##*/}"
    mv "$1" "$2"
}

lock() { # one setup at a time; and nothing left of a killed one
    mkdir -p "$opt/runtimes" "$opt/versions"
    exec 9>"$opt/lock"
    flock -n 9 || die "Another setup runs on this machine."
    rm -rf "$staging"
    [ ! -f "$opt/unfinished" ] || say "the last run was ended before it was done; this one goes on from there"
}

# --- install, upgrade, repair ---------------------------------------------------------------------------------------

begin() {
    lock
    mkdir -p "$staging"
    cp "$medium/MANIFEST" "$staging/MANIFEST"
    [ "$(sum <"$staging/MANIFEST")" = "$manifest_sha" ] || die "MANIFEST changed on the medium while it was read."
    id=$(field runtime) runtime=$opt/runtimes/$id
    name=$(field version)-$(printf %s "$manifest_sha" | cut -c 1-8) version=$opt/versions/$name
    old=$(target current)
    [ "$verb" != repair ] || [ "$old" = "$name" ] || die "Installed is ${old:-nothing}, and this bundle is $name:" \
        "repair takes the bundle that the installed version came from. sh install.sh installs or upgrades."
    take setup/unpack.py
    take setup/setup.sh
}

check_room() {
    need=$(($(sed -n 's/^file [0-9a-f]* \([0-9]*\) .*/\1/p' "$staging/MANIFEST" | paste -sd+ -) ))
    have=$(df -Pk "$opt" | sed -n '2s/^[^ ]* *[0-9]* *[0-9]* *\([0-9]*\) .*/\1/p')
    [ -d "$runtime" ] || [ "$have" -gt $((need * 4 / 1024)) ] || die "/opt has $((have / 1024)) MiB free;" \
        "$((need * 4 / 1048576)) MiB are needed to unpack this bundle."
}

add_runtime() {
    if is_intact "$runtime"; then
        say "runtime $id is there, as it was installed"
        check_mldsa
        return
    fi
    [ "$(field kind)" = full ] || die "This delta needs the runtime $id, which is not here or damaged." \
        "Here are: $(ls "$opt/runtimes")" "Take the whole bundle."
    say "unpacking Python and its packages"
    mkdir "$staging/runtime"
    take runtime/runtime.tar.gz
    take runtime/launcher
    tar --no-same-owner -xzf "$staging/runtime.tar.gz" -C "$staging/runtime"
    put "$staging/runtime/launcher" 755 <"$staging/launcher"
    final=$runtime runtime=$staging/runtime
    unpack wheels --into "$runtime" --final "/opt/vashista/runtimes/$id"
    check_mldsa
    swap "$staging/runtime" "$final"
    runtime=$final
}

check_mldsa() { # where the system's openssl could not: by the bundle's cryptography, whose hash is checked
    [ -z "$mldsa" ] || unpack mldsa || die "THE ML-DSA-87 SIGNATURE IS WRONG. Do not use this bundle; nothing of it is installed."
}

add_version() {
    if is_intact "$version"; then return; fi
    mkdir -p "$staging/version/bin" "$staging/version/share"
    cp "$staging/MANIFEST" "$staging/version/share/MANIFEST"
    cp -R "$medium/signature" "$staging/version/share/signature"
    put "$staging/version/bin/vashista-setup" 755 <"$staging/setup.sh"
    write_commands
    unpack version --into "$staging/version" --final "/opt/vashista/versions/$name"
    swap "$staging/version" "$version"
}

write_commands() { # Python and vashista of this version; the paths are those of the running machine
    put "$staging/version/pyvenv.cfg" 644 <<END
home = /opt/vashista/runtimes/$id/usr/bin
include-system-site-packages = true
END
    ln -s "../../runtimes/$id" "$staging/version/runtime"
    for command in python vashista; do put "$staging/version/bin/$command" 755 <"$runtime/launcher"; done
    put "$staging/version/bin/start.py" 644 <<'END'
import sys

from vashista.server.cli import main

if __name__ == "__main__":
    sys.exit(main())
END
}

check_settings() { # those of the machine, with the new version, before anything of the old one is touched
    [ -n "$root" ] || [ ! -f "$etc/vashista.toml" ] || "$version/bin/python" -P -c '
import pathlib, sys
from vashista.engine.errors import VashistaError
from vashista.server.settings import load_settings
try:
    load_settings({}, {}, config=pathlib.Path(sys.argv[1]), defaults={"model": "/none"})
except VashistaError as error:
    sys.exit(f"setup: {error.message}\n       {error.remedy}")' "$etc/vashista.toml" ||
        die "The new version cannot be served with $etc/vashista.toml. Nothing was changed;" \
            "correct the file (all settings: $version/share/vashista.toml) and run this again."
}

add_user() {
    if [ ! -f "$root/etc/passwd" ]; then say "$root has no /etc/passwd, so no user is made"; return; fi
    if [ -z "$(owner)" ]; then
        useradd ${root:+--prefix "$root"} --system --user-group --no-create-home --home-dir /var/lib/vashista \
            --shell /usr/sbin/nologin vashista || die "The user vashista cannot be made."
        say "made the system user vashista"
    fi
}

add_folders() {
    mkdir -p "$etc/tls" "$etc/trust/bundle" "$etc/trust/models" "$state" "$models" "$cache" "$units" "$root/usr/local/bin" "$root/usr/local/sbin"
    chmod 700 "$state"
    chmod 750 "$etc/tls"
    [ -z "$(owner)" ] || { chown -R "$(owner)" "$state" "$cache"; chown "0:$(owner | cut -d : -f 2)" "$etc/tls"; }
    for key in "$version"/share/signature/*.pem; do put "$etc/trust/bundle/${key##*/}" 644 <"$key"; done
    [ -f "$version/share/signature/mldsa.pem" ] || rm -f "$etc/trust/bundle/mldsa.pem"
}

add_models() {
    listed models/ | sed 's|^[0-9a-f]*  \([^/]*\)/.*|\1|' | sort -u | while read -r model; do
        if [ ! -d "$models/$model" ]; then
            rm -rf "$models/.new"
            unpack copy --below "models/$model" --into "$models/.new"
            grep -qxF "$model" "$opt/models" 2>/dev/null || echo "$model" >>"$opt/models"
            mv "$models/.new" "$models/$model"
            say "installed the model $models/$model"
        elif ! differing=$(cd "$models/$model" && listed "models/$model/" | sha256sum --check --quiet 2>/dev/null); then
            if [ "$verb" = repair ]; then
                unpack copy --below "models/$model" --into "$models/$model"
                say "put back in $models/$model: $(echo "$differing" | sed 's/:.*//' | paste -sd ' ' -)"
            else
                say "left the model $models/$model as it is, which differs from the bundle's in" \
                    "$(echo "$differing" | sed 's/:.*//' | paste -sd ' ' -)"
            fi
        fi
    done
    if [ -n "$(listed kernel-cache/)" ] && [ ! -d "$cache/triton" ]; then
        unpack copy --below kernel-cache --into "$cache/triton"
        [ -z "$(owner)" ] || chown -R "$(owner)" "$cache/triton"
    fi
}

add_settings() {
    [ -f "$etc/vashista.toml" ] || {
        put "$etc/vashista.toml" 640 <"$version/share/vashista.toml"
        [ -z "$(owner)" ] || chown "0:$(owner | cut -d : -f 2)" "$etc/vashista.toml"
        say "wrote $etc/vashista.toml"
    }
    put "$root/usr/local/bin/vashista" 755 <<'END'
#!/bin/sh
# Vashista's command with this machine's settings. Keys and ledger are the server's: root uses them as its user, so that
# the server can still read what was written.
config=/etc/vashista/vashista.toml command=/opt/vashista/current/bin/vashista
[ -n "${VASHISTA_CONFIG-}" ] || [ ! -r $config ] || export VASHISTA_CONFIG=$config
case $(id -u)/${1-} in 0/keys | 0/ledger) exec runuser -u vashista -- $command "$@" ;; esac
exec $command "$@"
END
    point "$root/usr/local/sbin/vashista-setup" /opt/vashista/current/bin/vashista-setup
}

add_units() { # of the version in $1, and away with those that it no longer has
    from=$opt/versions/$1/share/systemd
    new=$(cd "$from" && find . -maxdepth 1 -type f | sed 's|^\./||' | sort)
    ! grep -qx 'variant cuda' "$opt/versions/$1/share/MANIFEST" || new="$new
vashista.service.d/gpu.conf"
    before=$(cat "$opt/units" 2>/dev/null || true)
    printf '%s\n' "$before" "$new" | sed '/^$/d' | sort -u | put "$opt/units" 644
    socket=$(cat "$units/vashista.socket" 2>/dev/null || true)
    for unit in $new; do
        mkdir -p "$(dirname "$units/$unit")"
        put "$units/$unit" 644 <"$from/$unit"
    done
    for unit in $before; do
        echo "$new" | grep -qxF "$unit" || { service disable --now "$unit" 2>/dev/null || true; rm -f "$units/$unit"; }
    done
    echo "$new" | put "$opt/units" 644
    [ -z "$socket" ] || [ "$socket" = "$(cat "$units/vashista.socket")" ] ||
        say "vashista.socket changed; \`systemctl restart vashista.socket\` takes the change over, refusing requests meanwhile"
    if command -v restorecon >/dev/null 2>&1; then restorecon -R "$opt" "$etc" "$units" "$root/usr/local" >/dev/null 2>&1 || true; fi
}

switch_to() { # a version; the one that was current becomes previous
    was=$(target current)
    wanted=yes; [ -z "$was" ] || is_running || [ -f "$opt/unfinished" ] || wanted=
    echo "$1" | put "$opt/unfinished" 644
    if [ "$was" != "$1" ]; then
        [ -z "$was" ] || point "$opt/previous" "versions/$was"
        point "$opt/current" "versions/$1"
    fi
    add_units "$1"
}

start() { # what the links and units say now; waits until it answers
    [ -n "$live" ] || return 0
    systemctl daemon-reload
    if [ -z "$wanted" ]; then say "vashista.service was stopped and stays so: systemctl start vashista"; return; fi
    grep -q '^ *model *=' "$etc/vashista.toml" || { no_model=yes; return; }
    systemctl --quiet enable vashista.socket vashista.service
    systemctl start vashista.socket && systemctl restart vashista.service && await_ready
}

await_ready() { # where the unit does not tell by itself that it is ready
    [ "$(systemctl show --property Type --value vashista.service)" != notify ] || return 0
    address=$(systemctl show --property Listen --value vashista.socket | cut -d ' ' -f 1)
    waited=0
    until python "$opt/versions/$(target current)/../../runtimes/$(sed -n 's/^runtime //p' "$opt/current/share/MANIFEST")" -c '
import socket, sys
host, _, port = sys.argv[1].rpartition(":")
with socket.socket(socket.AF_UNIX) if "/" in sys.argv[1] else socket.create_connection((host.strip("[]"), int(port)), 5) as s:
    if "/" in sys.argv[1]: s.connect(sys.argv[1])
    s.settimeout(5)
    s.sendall(b"GET /ready HTTP/1.0\r\nHost: localhost\r\n\r\n")
    sys.exit(not s.recv(64).startswith(b"HTTP/1.1 200"))' "$address" 2>/dev/null; do
        waited=$((waited + 1))
        [ $waited -le 1500 ] && ! systemctl is-failed --quiet vashista.service || return 1
        sleep 0.2
    done
}

tidy() { # versions and runtimes that neither link needs
    for path in "$opt"/versions/*; do
        case ${path##*/} in "$(target current)" | "$(target previous)") ;; *) rm -rf "$path" ;; esac
    done
    for path in "$opt"/runtimes/*; do
        grep -qx "runtime ${path##*/}" "$opt"/versions/*/share/MANIFEST || rm -rf "$path"
    done
    rm -rf "$staging"
}

install_version() {
    begin
    check_room
    add_runtime
    add_version
    check_settings
    add_user
    add_folders
    add_models
    add_settings
    switch_to "$name"
    if ! start; then
        rm -f "$opt/unfinished"
        if [ -n "$old" ] && [ "$old" != "$name" ]; then
            say "$name does not start; going back to $old"
            journal
            wanted=yes
            point "$opt/current" "versions/$old"
            add_units "$old"
            start || die "The old version does not start either: journalctl -u vashista"
            die "$old runs as before. $name stays in $version for a look; ledger and keys are as they were."
        fi
        journal
        die "Installed, but vashista.service does not start; the lines above say why." "Correct it, then: systemctl restart vashista"
    fi
    rm -f "$opt/unfinished"
    tidy
    report
}

journal() { service --no-pager --lines 15 --full status vashista.service >&2 || true; }

report() {
    say "$(target current) is installed in /opt/vashista/current${old:+; before it: $(target previous)}"
    if [ -n "${no_model:-}" ]; then
        say "no model is set: put one into $models, name it in $etc/vashista.toml, then: systemctl enable --now vashista.socket vashista"
    elif [ -n "$live" ] && [ -n "$wanted" ]; then
        say "vashista.service answers at $(systemctl show --property Listen --value vashista.socket | cut -d ' ' -f 1)"
    elif [ -z "$live" ]; then
        say "nothing was started: there is no running systemd here"
    fi
    [ -n "$old" ] || echo "Open        everyone who reaches the port is answered, until: vashista keys create NAME"
    echo "Settings    $etc/vashista.toml (systemctl restart vashista takes a change over)"
    echo "State       $state: ledger and keys; back it up"
    echo "Check       vashista-setup status; vashista doctor; vashista selftest"
    echo "Go back     vashista-setup rollback"
    echo "Remove      vashista-setup uninstall"
}

# --- without a bundle -----------------------------------------------------------------------------------------------

rollback() {
    lock
    back=$(target previous) old=$(target current)
    if [ -z "$back" ] || [ ! -d "$opt/versions/$back" ] || [ "$back" = "$old" ]; then
        die "There is no version before ${old:-this} to go back to."
    fi
    version=$opt/versions/$back
    check_settings
    switch_to "$back"
    start || { journal; die "$back is current, but does not start: journalctl -u vashista"; }
    rm -f "$opt/unfinished"
    tidy
    say "back at $back; $old can be had again with another rollback. Ledger, keys and settings are untouched."
}

status() {
    [ -n "$(target current)" ] || die "Vashista is not installed${root:+ below $root}."
    echo "current     $(target current)"
    echo "previous    $(target previous)"
    [ ! -f "$opt/unfinished" ] || echo "unfinished  $(cat "$opt/unfinished"): run the same command again"
    [ -z "$live" ] || echo "service     $(systemctl is-active vashista.service || true), $(systemctl is-enabled vashista.service 2>/dev/null || true)"
    [ -z "$live" ] || echo "socket      $(systemctl is-active vashista.socket || true), $(systemctl show --property Listen --value vashista.socket)"
    echo "keys        $(cat "$etc"/trust/bundle/ecdsa.pem "$etc"/trust/bundle/mldsa.pem 2>/dev/null | sum)"
}

check() {
    [ -n "$(target current)" ] || die "Vashista is not installed${root:+ below $root}."
    for place in versions/"$(target current)" runtimes/"$(sed -n 's/^runtime //p' "$opt/current/share/MANIFEST")"; do
        wrong=$(cd "$opt/$place" && sha256sum --check --quiet --strict FILES 2>/dev/null) ||
            die "Not as it was installed, in $opt/$place:" "$wrong" "From the bundle: sh install.sh repair"
        wrong=$(cd "$opt/$place" && added)
        [ -z "$wrong" ] || die "Files that were not installed, in $opt/$place:" "$wrong" "From the bundle: sh install.sh repair"
        say "$opt/$place: $(wc -l <"$opt/$place/FILES") files as they were installed"
    done
}

uninstall() {
    [ -d "$opt" ] || [ -n "$purge" ] || die "Vashista is not installed${root:+ below $root}."
    lock
    service disable --now vashista.service vashista.socket 2>/dev/null || true
    [ ! -f "$opt/units" ] || while read -r unit; do
        service stop "$unit" 2>/dev/null || true
        rm -f "$units/$unit"
    done <"$opt/units"
    rmdir "$units"/vashista*.d 2>/dev/null || true
    service daemon-reload
    service reset-failed 'vashista*' 2>/dev/null || true
    [ ! -f "$opt/models" ] || while read -r model; do rm -rf "${models:?}/$model"; done <"$opt/models"
    rm -rf "$cache" "$root/run/vashista" "$etc/vashista.toml" "$etc/trust/bundle" "$root/usr/local/bin/vashista" "$models/.new"
    if [ -n "$purge" ]; then
        rm -rf "$state" "$etc" "$root/srv/vashista"
    else
        [ ! -d "$state" ] || [ "$(id -u)" != 0 ] || chown -R 0:0 "$state" # nobody who gets the number later may read it
        rmdir "$state" "$etc/tls" "$etc/trust/models" "$etc/trust" "$etc" "$models" "$root/srv/vashista" 2>/dev/null || true
    fi
    [ -z "$(owner)" ] || userdel ${root:+--prefix "$root"} vashista 2>/dev/null || say "the user vashista cannot be removed"
    rm -rf "$opt/runtimes" "$opt/current" "$opt/previous"
    rm -rf "$root/usr/local/sbin/vashista-setup" "$opt"
    left=$(ls -d "$state" "$etc" "$models"/* 2>/dev/null || true)
    say "Vashista is removed${left:+; kept: $(echo "$left" | paste -sd ' ' -)}"
}

read_arguments "$@"
case $verb in
    install | repair) install_version ;;
    rollback) rollback ;;
    uninstall) uninstall ;;
    status) status ;;
    check) check ;;
    *) die "$verb is not known; known are status, check, rollback and uninstall [--purge]." ;;
esac
