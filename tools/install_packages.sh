#!/bin/sh
# Install the Debian packages that the build and the emulated host need and this machine lacks.
# A machine that has them all needs neither apt nor root.
#
# No package here has a version in its name, so that the list holds for every release of Debian.
# Kernels are not in it: their headers, sources and images are unpacked into pykvm's cache.
set -eu

packages="
	python3 python3-venv python3-dev
	gcc libc6-dev libelf-dev make patch clang llvm
	git tar xz-utils lz4 zstd cpio kmod e2fsprogs util-linux acpica-tools
	bochs bochsbios vgabios xorriso
	iproute2 qemu-utils passt dnsmasq-base gdb
"

missing() {
	for package; do
		status=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
		[ "$status" = installed ] || echo "$package"
	done
}

as_root() {
	if [ "$(id -u)" -eq 0 ]; then "$@"; else sudo "$@"; fi
}

# The sanitizers' run-time library is a package for each version of clang, and one without a
# version exists only since Debian 13.
sanitizers() {
	apt-cache depends clang | sed -n 's/^ *Depends: clang-\([0-9]*\)$/libclang-rt-\1-dev/p'
}

# The server of a guest's root file system has a package of its own since Debian 13.
file_server() {
	if apt-cache show virtiofsd >/dev/null 2>&1; then
		echo virtiofsd
	else
		echo qemu-system-common
	fi
}

if ! command -v apt-get >/dev/null; then
	echo "setup: no apt-get here; use Debian 12 or 13" >&2
	exit 1
fi
if [ -n "$(missing $packages)" ]; then
	echo "setup: reading the package lists"
	as_root apt-get -q update
fi
wanted=$(missing $packages $(sanitizers) $(file_server))
if [ -n "$wanted" ]; then
	echo "setup: installing Debian packages:" $wanted
	as_root env DEBIAN_FRONTEND=noninteractive \
		apt-get -q install -y --no-install-recommends $wanted
fi
