#!/bin/sh
# Checks this folder, then installs Vashista from it. Needs no network; asks nothing; changes nothing before all is checked.
#
#   sh install.sh --fingerprint HEX         first installation: HEX is the fingerprint that you were told another way
#   sh install.sh                           again, or an upgrade: signed by the key that the machine knows
#   sh install.sh verify [--fingerprint HEX]  check only
#   sh install.sh repair                    put what was installed from this bundle back as it was
#
#   --fingerprint HEX   SHA-256 of the public keys in signature/. Printed by `vashista bundle build`. On a machine with
#                       another trusted key it says that the new one is right.
#   --root DIR          install below DIR, such as the mounted root of a machine that is not running; starts nothing
#
# Checked are: the signature of MANIFEST (ECDSA P-384; ML-DSA-87 too where openssl knows it), the SHA-256 of every file,
# and that there is no other file. There is no way around this. What is read again later is hashed again then.
# To check this script before running it, see README.txt.
set -eu
umask 022
export LC_ALL=C
PATH=$PATH:/usr/sbin:/sbin

say() { echo "install: $*"; }
die() { echo "install: $1" >&2; shift; for line in "$@"; do echo "         $line" >&2; done; exit 1; }

read_arguments() {
    verb=install root='' fingerprint=''
    case ${1:-} in install | verify | repair | rollback | uninstall) verb=$1; shift ;; esac
    while [ $# -gt 0 ]; do
        case $1 in
            --fingerprint) fingerprint=$(printf %s "${2:?install: --fingerprint needs 64 hex digits}" | tr 'A-F' 'a-f' | tr -d ': '); shift 2 ;;
            --root) root=${2:?install: --root needs a folder}; shift 2 ;;
            -h | --help) sed -n '2,/^set -eu/{/^#/s/^# \{0,1\}//p;}' "$0"; exit 0 ;;
            *) die "$1 is not known; see sh install.sh --help." ;;
        esac
    done
    medium=$(cd "$(dirname "$0")" && pwd -P)
    case $root in '' | /) root='' ;; *) root=$(cd "$root" && pwd -P) || die "There is no folder $root." ;; esac
}

check_machine() {
    [ "$(uname -s) $(uname -m)" = "Linux x86_64" ] || die "This is $(uname -s) on $(uname -m); Vashista needs Linux on x86_64."
    missing=
    for tool in openssl sha256sum find sed sort tar gzip df flock od paste; do
        command -v $tool >/dev/null 2>&1 || missing="$missing $tool"
    done
    [ -z "$missing" ] || die "These tools of the system are missing:$missing." "Install them from the system's own medium."
    [ "$verb" = verify ] || [ "$(id -u)" = 0 ] || [ -n "$root" ] || die "Run this as root: sudo sh install.sh"
}

read_manifest() { # into a variable, so that what is checked is what is used
    cd "$medium"
    for name in MANIFEST signature/ecdsa.pem signature/ecdsa.sig; do
        [ -f $name ] || die "$name is missing: this is not a whole bundle. Unpack the .tar again."
    done
    manifest=$(cat MANIFEST && echo x) 2>/dev/null || die "MANIFEST cannot be read."
    manifest=${manifest%x}
    [ "$(sum <MANIFEST)" = "$(printf %s "$manifest" | sum)" ] || die "MANIFEST is not plain text."
}

sum() { sha256sum | cut -d ' ' -f 1; }
public_keys() { cat "$1/ecdsa.pem" "$1/mldsa.pem" 2>/dev/null; }

check_key() { # that the key is the one that the operator was told, or that this machine knows
    found=$(public_keys signature | sum)
    trust=$root/etc/vashista/trust/bundle
    if [ -n "$fingerprint" ]; then
        [ "$found" = "$fingerprint" ] || die "NOT THE KEY YOU NAMED. The bundle's keys have the fingerprint" \
            "$found" "and you gave" "$fingerprint" "Do not use this bundle unless you mistyped it."
    elif [ -f "$trust/ecdsa.pem" ]; then
        known=$(public_keys "$trust" | sum)
        [ "$found" = "$known" ] || die "ANOTHER KEY. This machine trusts" "$known" "and the bundle's keys are" "$found" \
            "If the publisher changed the key, run this with --fingerprint and the one you were told another way."
    else
        die "The bundle's keys have the fingerprint" "$found" \
            "Compare it with the one that you were told another way. If they are equal:" \
            "sh $medium/install.sh${verb:+ $verb} --fingerprint $found"
    fi
}

check_signature() {
    # ECDSA is over MANIFEST and the other signature's SHA-256, so that an openssl that knows ECDSA alone sees any change.
    { printf %s "$manifest"; [ ! -f signature/mldsa.pem ] || sha256sum signature/mldsa.sig; } 2>/dev/null |
        openssl dgst -sha384 -verify signature/ecdsa.pem -signature signature/ecdsa.sig >/dev/null 2>&1 ||
        die "THE SIGNATURE IS WRONG: MANIFEST or a file of signature/ was changed." "Do not use this bundle."
    # openssl does not read what stands after a signature of full length.
    [ "$(wc -c <signature/ecdsa.sig)" -eq $((2 + $(od -An -tu1 -j1 -N1 signature/ecdsa.sig))) ] ||
        die "THE SIGNATURE IS WRONG: signature/ecdsa.sig is longer than it says." "Do not use this bundle."
    signed="ECDSA P-384"
    [ -f signature/mldsa.pem ] || return 0
    if openssl list -signature-algorithms 2>/dev/null | grep -q ML-DSA-87; then
        openssl pkeyutl -verify -pubin -inkey signature/mldsa.pem -rawin -in MANIFEST -sigfile signature/mldsa.sig >/dev/null 2>&1 ||
            die "THE SIGNATURE IS WRONG: signature/mldsa.sig does not fit. Do not use this bundle."
        signed="$signed and ML-DSA-87"
    else
        later=yes # openssl before 3.5; the bundle's own tools do it once their hashes are checked
    fi
}

files() { printf %s "$manifest" | sed -n 's/^file \([0-9a-f]\{64\}\) [0-9]* /\1  /p'; }
field() { printf %s "$manifest" | sed -n "s/^$1 //p"; }

check_files() {
    case $manifest in "vashista-bundle 1
"*) ;; *) die "This bundle is of a newer form than this script: use its own install.sh." ;; esac
    odd=$(find . ! -type f ! -type d)
    [ -z "$odd" ] || die "Neither a file nor a folder, and not of this bundle:" "$odd"
    listed=$( (files | sed 's/^.\{66\}//'; echo MANIFEST; signature_files) | sort)
    there=$(find . -type f | sed 's|^\./||' | sort)
    if [ "$listed" != "$there" ]; then
        die "The files are not those of MANIFEST. Missing (-) or not of this bundle (+):" "$(differences)"
    fi
    wrong=$(files | sha256sum --check --quiet 2>/dev/null) || die "CHANGED since they were signed:" "$wrong" "Copy the bundle again."
}


signature_files() {
    printf 'signature/%s\n' ecdsa.pem ecdsa.sig
    [ ! -f signature/mldsa.pem ] || printf 'signature/%s\n' mldsa.pem mldsa.sig
}

differences() {
    printf '%s\n' "$listed" "$there" "$there" | sort | uniq -u | sed 's/^/- /'
    printf '%s\n' "$there" "$listed" "$listed" | sort | uniq -u | sed 's/^/+ /'
}

later=
read_arguments "$@"
check_machine
read_manifest
check_key
check_signature
check_files
say "Vashista $(field version) for $(field variant) ($(field kind)): signature good ($signed), $(files | wc -l) files as they were signed"
[ "$verb" != verify ] || exit 0
setup=$(cat setup/setup.sh)
[ "$(printf '%s\n' "$setup" | sum)" = "$(files | sed -n 's|  setup/setup.sh$||p')" ] || die "setup/setup.sh changed while it was read."
exec sh -c "$setup" vashista-setup "$verb" --medium "$medium" --manifest "$(printf %s "$manifest" | sum)" ${root:+--root "$root"} ${later:+--check-mldsa}
