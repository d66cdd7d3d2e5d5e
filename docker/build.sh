#!/usr/bin/env bash
# Builds the CPU image without an engine and without an image registry, runs it, and removes it again. Weekly, as root:
#   apt-get install buildah mmdebstrap && docker/build.sh
# The base image is Debian's own bootstrap. GR_BUILD_OPTIONS: more options of `buildah bud`, for example a pip.conf to mount.
set -euo pipefail
cd "$(dirname "$0")/.."
store=$(mktemp -d /var/tmp/gr-image.XXXXXX)
trap 'rm -rf "$store"' EXIT
buildah() { command buildah --root "$store/root" --runroot "$store/run" --storage-driver vfs "$@"; }

mmdebstrap --variant=minbase --include=ca-certificates bookworm "$store/base.tar"
printf 'FROM scratch\nADD base.tar /\n' > "$store/Dockerfile.base"
buildah bud --isolation chroot -t localhost/gr-base -f "$store/Dockerfile.base" "$store"
rm "$store/base.tar"
# shellcheck disable=SC2086  # several options
buildah bud --isolation chroot --network host --pull-never --build-arg BASE=localhost/gr-base ${GR_BUILD_OPTIONS:-} \
    --ignorefile .dockerignore -t localhost/gr -f docker/Dockerfile .

container=$(buildah from --pull-never localhost/gr)
# Ranks meet under the host's name, which chroot isolation puts into no /etc/hosts.
run() { buildah run --isolation chroot --hostname localhost "$container" -- "$@"; }
run gr --version
run gr doctor
[ "$(run id -u)" != 0 ] || { echo "error: the image runs as root" >&2; exit 1; }
if run sh -c 'command -v gcc || command -v make'; then echo "error: the image holds build tools" >&2; exit 1; fi
run sh -c 'cd /tmp && cp -r /workspace w && cd w && torchx run -s local_cwd launch/components.py:smoke'
buildah images
echo "docker/build.sh: the CPU image works"
