#!/bin/sh
# As root on Debian: install what `make stack-test` needs and what is absent of it: Docker's engine, its compose and buildx
# plugins, debootstrap. The engine of Debian 12 is too old for named build contexts, and it has no plugins; the programs of
# Debian 13 run there, and are taken from the mirror of this machine. Does nothing where an engine is running already.
set -eu
docker info > /dev/null 2>&1 && docker compose version > /dev/null 2>&1 && docker buildx version > /dev/null 2>&1 && exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then exit 0; fi

apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends \
    containerd runc iptables tini debootstrap curl ca-certificates > /dev/null
command -v dockerd > /dev/null && docker buildx version > /dev/null 2>&1 && docker compose version > /dev/null 2>&1 && exit 0

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/sources" "$work/lists/partial" "$work/root"
for file in /etc/apt/sources.list /etc/apt/sources.list.d/debian.sources; do
    if [ -f "$file" ]; then sed 's/bookworm/trixie/g' "$file" > "$work/sources/$(basename "$file" | sed 's/^sources.list$/debian.list/')"; fi
done
of_debian_13() {
    apt-get -qq -o Dir::Etc::SourceList=/dev/null -o Dir::Etc::SourceParts="$work/sources" \
        -o Dir::State::Lists="$work/lists" -o APT::Sandbox::User=root "$@"
}
of_debian_13 update
(cd "$work" && of_debian_13 download docker.io docker-cli docker-buildx docker-compose)
for package in "$work"/*.deb; do dpkg-deb --extract "$package" "$work/root"; done
install --directory /usr/local/lib/docker/cli-plugins
install "$work"/root/usr/libexec/docker/cli-plugins/* /usr/local/lib/docker/cli-plugins
install "$work"/root/usr/sbin/dockerd "$work"/root/usr/sbin/docker-proxy /usr/local/sbin
command -v docker-init > /dev/null || ln -s "$(command -v tini-static)" /usr/local/sbin/docker-init
command -v docker > /dev/null || install "$work"/root/usr/bin/docker /usr/local/bin
dockerd --version
