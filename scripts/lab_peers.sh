#!/bin/sh
# Fetch SSH implementations of other Debian releases for the lab's captures, without installing any of them.
#
# usage: lab_peers.sh VENV
#
# Each release's OpenSSH and dropbear are unpacked into VENV/lab-peers/RELEASE, with the C library they were built for;
# patchelf makes them find it there. Lists and downloads are kept apart from the system's. Python's peers come by pip
# into the same environment, Go's client is compiled if there is a Go. What cannot be had is said, and left out.
set -eu

venv=${1:?usage: lab_peers.sh VENV}
releases='bullseye bookworm trixie sid'
wanted='openssh-client openssh-server openssh-sftp-server dropbear-bin'
archive=http://deb.debian.org/debian

say() { printf '%s\n' "lab-peers: $*" >&2; }

private_apt() { # private_apt FOLDER COMMAND...: apt with lists, sources and downloads of its own
    folder=$1; shift
    command=$1; shift
    "$command" -qq -o Dir::State::lists="$folder/lists" -o Dir::Cache="$folder/cache" \
        -o Dir::Etc::sourcelist="$folder/sources.list" -o Dir::Etc::sourceparts=- \
        -o Dir::State::status=/dev/null -o APT::Sandbox::User=root "$@"
}

unpack() { # unpack RELEASE TARGET
    work=$(mktemp -d)
    mkdir -p "$work/lists/partial" "$work/cache/archives/partial" "$2"
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $archive $1 main" >"$work/sources.list"
    private_apt "$work" apt-get update
    # shellcheck disable=SC2086  # a list of names is meant
    packages=$(private_apt "$work" apt-get --simulate --no-install-recommends install $wanted |
        sed -n 's/^Inst \([^ ]*\) .*/\1/p' | grep -E '^(lib|openssh|dropbear|zlib)')
    # shellcheck disable=SC2086
    (cd "$work" && private_apt "$work" apt-get download $packages)
    for package in "$work"/*.deb; do
        dpkg -x "$package" "$2"
    done
    rm -rf "$work"
}

bind() { # bind TARGET: let its programs run with its own C library
    loader=$(find "$1" -name 'ld-linux-x86-64.so.2' -type f -o -name 'ld-2.*.so' -type f | head -1)
    libraries=$(find "$1" -name '*.so*' -printf '%h\n' | sort -u | tr '\n' ':')
    for program in "$1"/usr/bin/ssh "$1"/usr/bin/ssh-keygen "$1"/usr/bin/scp "$1"/usr/bin/sftp "$1"/usr/sbin/sshd \
        "$1"/usr/bin/dbclient "$1"/usr/sbin/dropbear "$1"/usr/bin/dropbear* "$1"/usr/lib/openssh/s*; do
        if [ -f "$program" ] && [ ! -h "$program" ] && patchelf --print-interpreter "$program" >/dev/null 2>&1; then
            patchelf --set-interpreter "$(realpath "$loader")" --force-rpath \
                --set-rpath "$(realpath_list "$libraries")" "$program"
        fi
    done
}

realpath_list() { # realpath_list A:B: the same, absolute
    printf '%s' "$1" | tr ':' '\n' | while read -r one; do [ -z "$one" ] || printf '%s:' "$(realpath "$one")"; done
}

command -v patchelf >/dev/null || { say "patchelf is missing (apt-get install patchelf)"; exit 3; }
for release in $releases; do
    target=$venv/lab-peers/$release
    [ -x "$target/usr/bin/ssh" ] && continue
    say "$release"
    if unpack "$release" "$target.new" && bind "$target.new"; then
        mv "$target.new" "$target"
        bind "$target"
    else
        say "$release cannot be had"; rm -rf "$target.new"
    fi
done
"$venv/bin/python" -m pip install --quiet asyncssh paramiko ssh-python websockify \
    nats-py paho-mqtt pika redis websockets ||
    say "the Python peers cannot be had"
if command -v go >/dev/null && [ ! -x "$venv/lab-peers/go-client" ]; then
    # Debian's golang-golang-x-crypto-dev is a source tree, not a module.
    GO111MODULE=off GOPATH=/usr/share/gocode go build -o "$venv/lab-peers/go-client" gpuguard/lab/clients/client.go ||
        say "Go's client cannot be had (apt-get install golang-golang-x-crypto-dev)"
fi
for tool in tcpdump ping socat curl rsync git autossh redis-server nats-server mosquitto stunnel iodine iodined \
    dns2tcpc dns2tcpd ptunnel-ng ifconfig; do
    command -v "$tool" >/dev/null || say "$tool is missing: scenarios that need it will fail"
done
