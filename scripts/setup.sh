#!/usr/bin/env bash
# Installs the Debian or Ubuntu packages that building, testing and the demo need; silent when all are there.
#   scripts/setup.sh [PACKAGE...]   installs what is missing (as root, or through sudo), these packages too
#   scripts/setup.sh --check        only lists what is missing; exits 1 when anything is
#   SETUP=skip                   for machines that have all of it from elsewhere: does nothing
set -euo pipefail

# a|b: either will do, the first that the distribution has is installed.
packages=(
    g++ make 'pkg-config|pkgconf'
    libdnnl-dev libboost-context-dev                         # the CPU build: matrix products, fibers
    libopenmpi-dev openmpi-bin                               # ranks
    libcli11-dev libtomlplusplus-dev nlohmann-json3-dev      # command line, configuration
    libpcre2-dev libutf8proc-dev                             # tokenizer
    zlib1g-dev libzstd-dev                                   # compressed text
    libgtest-dev                                             # tests
    python3 python3-matplotlib curl ca-certificates          # plots, sample data
)

say() { echo "setup: $*"; }
fail() { say "$*" >&2; exit 1; }

is_installed() { [[ $(dpkg-query --show --showformat='${db:Status-Status}' "$1" 2>/dev/null) == installed ]]; }

# The first of the alternatives a|b that apt knows, else a.
choose() {
    local name
    for name in ${1//|/ }; do
        if apt-cache show "$name" >/dev/null 2>&1; then echo "$name"; return; fi
    done
    echo "${1%%|*}"
}

missing() {
    local package name
    for package in "${packages[@]}"; do
        for name in ${package//|/ }; do is_installed "$name" && continue 2; done
        echo "$package"
    done
}

apt() {
    # The lock: a fresh machine may be busy with its automatic updates.
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300 "$@" </dev/null
}

check=0
if [[ $* == --check ]]; then check=1; set --; fi
for argument; do
    case $argument in
        -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit ;;
        -* | '') echo "setup: unknown argument '$argument'; see $0 --help" >&2; exit 2 ;;
    esac
done
packages+=("$@")
if [[ ${SETUP:-} == skip ]]; then exit 0; fi

if ! command -v dpkg-query >/dev/null; then
    say "no Debian packages here; the build needs what Debian calls: ${packages[*]%%|*}" >&2
    exit $check  # they may be there under other names: let the build try
fi

mapfile -t needed < <(missing)
if ((${#needed[@]} == 0)); then exit 0; fi
if ((check)); then
    printf '%s\n' "${needed[@]%%|*}"
    exit 1
fi

command=(apt-get install "${needed[@]%%|*}")
otherwise="; have them installed with: ${command[*]} (or set SETUP=skip if they are there in another form)"
command -v apt-get >/dev/null || fail "packages are missing, and there is no apt-get here$otherwise"
as_root=()
if ((EUID != 0)); then
    as_root=(sudo)
    if [[ ! -t 0 ]]; then as_root=(sudo -n); fi  # nobody is there to type a password
    "${as_root[@]}" true 2>/dev/null || fail "packages are missing, and this is neither root nor has sudo$otherwise"
fi

say "installing ${needed[*]%%|*} (several hundred MB with what they need themselves: this can take minutes)"
# A source that cannot be reached need not be one of those we need: install says.
apt update || { sleep 3; apt update; } || say "apt-get update failed, going on with the package lists that are there"
names=()
for package in "${needed[@]}"; do names+=("$(choose "$package")"); done
apt install --yes --no-install-recommends "${names[@]}" >/dev/null ||
    fail "apt-get could not install ${names[*]} (on Ubuntu, most of them are in universe: add-apt-repository universe)"
