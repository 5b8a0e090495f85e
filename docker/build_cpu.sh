#!/bin/sh
# Build the CPU image with docker, podman or buildah, whichever is there.
#
#   docker/build_cpu.sh [arguments of `build`]        such as -t NAME, --build-arg BASE=...
#
#   PIP_CONF=FILE       this configuration of pip while it is built, and not in the image
#   DEBOOTSTRAP=MIRROR  make the base image with debootstrap from this mirror of Debian (buildah, as root), for where no
#                       registry is reached
#   BUILDER=...         docker, podman or buildah
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
tag=sglang-kevlar:0.1.0-cpu
for candidate in ${BUILDER:-docker podman buildah}; do
    # A client of Docker without a server builds nothing.
    if command -v "$candidate" >/dev/null && { [ "$candidate" != docker ] || docker info >/dev/null 2>&1; }; then
        builder=$candidate
        break
    fi
done
if [ -z "${builder:-}" ]; then
    echo "error: none of ${BUILDER:-docker, podman, buildah} is there (Debian: apt-get install buildah)" >&2
    exit 1
fi

if [ -n "${DEBOOTSTRAP:-}" ]; then
    base=localhost/debian:bookworm-minbase
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    debootstrap --variant=minbase --include=ca-certificates bookworm "$scratch/root" "$DEBOOTSTRAP"
    rm -rf "$scratch"/root/var/cache/apt/*.bin "$scratch"/root/var/cache/apt/archives/*.deb "$scratch"/root/var/lib/apt/lists/*
    container=$(buildah from scratch)
    buildah add --quiet "$container" "$scratch/root" / >/dev/null
    buildah commit --quiet --rm "$container" "$base" >/dev/null
    rm -rf "$scratch"
    set -- --build-arg "BASE=$base" "$@"
fi
if [ -n "${PIP_CONF:-}" ]; then set -- --secret "id=pip,src=$PIP_CONF" "$@"; fi
# Images in OCI's format have no health check.
if [ "$builder" != docker ]; then set -- --format docker "$@"; fi
"$builder" build --file "$root/docker/Dockerfile.cpu" --tag "$tag" "$@" "$root"
