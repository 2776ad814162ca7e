#!/bin/sh
# Set up a checkout: system packages where that is allowed, a virtual environment, the compiled parts.
#
# usage: setup.sh VENV
#
# As root on a Debian-like system it installs what is missing. Elsewhere it names what is missing in one line and goes
# on: what then lacks degrades, and `gpuguard doctor` says how. An SSH server is never installed, for installing one
# starts one; the incident lab gets its own copy, unpacked into the virtual environment.
set -eu

venv=${1:?usage: setup.sh VENV}
lab_root=$venv/lab-root

say() { printf '%s\n' "setup: $*" >&2; }
die() { say "$*"; exit 1; }
have() { PATH=$PATH:/usr/sbin:/sbin command -v "$1" >/dev/null 2>&1; }

header() { # header NAME: is there a C header of this name?
    for folder in /usr/include /usr/local/include /usr/include/"$(uname -m)"-linux-gnu; do
        [ -e "$folder/$1" ] && return 0
    done
    return 1
}

can_build() { # can_build PYTHON: new enough, with venv, pip and the headers for compiled modules?
    "$1" - 2>/dev/null <<'P'
import ensurepip, pathlib, sys, sysconfig, venv
header = pathlib.Path(sysconfig.get_path("include"), "Python.h")
sys.exit(not (sys.version_info >= (3, 11) and header.exists()))
P
}

find_python() { # print the first Python that can build this
    for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11 /usr/bin/python3; do
        if can_build "$candidate"; then
            "$candidate" -c 'import sys; print(sys.executable)'
            return 0
        fi
    done
    return 1
}

missing_packages() { # print the Debian packages whose programs, libraries or headers are not here
    have cc || printf 'build-essential '
    find_python >/dev/null || printf 'python3-venv python3-dev '
    have clang || printf 'clang '
    header bpf/libbpf.h || printf 'libbpf-dev '
    header libelf.h || printf 'libelf-dev '
    header zlib.h || printf 'zlib1g-dev '
    have ip || printf 'iproute2 '
    have nft || printf 'nftables '
    have ssh || printf 'openssh-client '
    have unshare || printf 'util-linux '
}

install_packages() { # install_packages NAME...
    say "installing $*"
    export DEBIAN_FRONTEND=noninteractive
    apt-get -qq update && apt-get -qq install --yes --no-install-recommends "$@" >/dev/null
}

system_packages() {
    packages=$(missing_packages | sed 's, *$,,')
    [ -n "$packages" ] || return 0
    # Word splitting is meant: the list is of package names.
    # shellcheck disable=SC2086
    if [ "$(id -u)" = 0 ] && have apt-get && install_packages $packages; then
        return 0
    fi
    say "not here, and not mine to install: $packages (as root: apt-get install $packages, then make -B setup)"
}

unpack_sshd() { # a private SSH server for the lab, and the two things it needs beside what every Debian has
    if have sshd || [ -x "$lab_root/usr/sbin/sshd" ]; then
        return 0
    fi
    have apt-get && have dpkg || { say "no sshd for the lab: not a Debian-like system"; return 0; }
    folder=$(mktemp -d)
    # As root apt drops to a user of its own, who must be able to write here.
    chmod 777 "$folder"
    if (cd "$folder" && apt-get -qq download openssh-server openssh-sftp-server libwrap0 >/dev/null 2>&1); then
        for package in "$folder"/*.deb; do
            dpkg -x "$package" "$lab_root"
        done
    else
        say "no sshd for the lab: apt-get could not download openssh-server (are the package lists there?)"
    fi
    rm -rf "$folder"
}

make_venv() {
    [ -x "$venv/bin/python" ] && "$venv/bin/python" -c 'import pip' 2>/dev/null && return 0
    python=$(find_python) || die "needs Python 3.11 or newer with venv and headers: python3-venv python3-dev"
    say "making $venv with $python"
    "$python" -m venv "$venv"
}

install_gpuguard() {
    have cc || die "needs a C compiler: build-essential"
    say "building and installing into $venv (a minute or two the first time)"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable '.[test]'
}

system_packages
make_venv
unpack_sshd
install_gpuguard
say "done"
