#!/bin/sh
# What both images are made by: put SGLang-Kevlar into an image that has SGLang. Run as root while it is built.
#
#   docker/install.sh SOURCES
#
# Ends with an error when this SGLang is not the one that SGLang-Kevlar was made for.
set -eu

sources=$1
# Ubuntu's and Debian's own Python otherwise refuse to be installed into; a container has only one use for it.
export PIP_BREAK_SYSTEM_PACKAGES=1 PIP_ROOT_USER_ACTION=ignore

# What it needs SGLang needs, too: it takes the versions that SGLang was installed with, or ends at the imports below.
python3 -m pip install --no-cache-dir --no-deps --no-build-isolation "$sources"
cd /
python3 -c 'import aiohttp, msgspec, psutil, yaml, zmq'
packages=$(python3 -c 'import pathlib, sglang_kevlar; print(pathlib.Path(sglang_kevlar.__file__).parents[1])')
upstream=$(python3 -c 'import importlib.util, pathlib
print(pathlib.Path(importlib.util.find_spec("sglang").origin).parents[1])')

# Every seam, flag and patch, in what is installed here; then the patches, on disk.
python3 "$sources/scripts/check_upstream.py" --installed
python3 -m sglang_kevlar.upstream.patches apply "$upstream"

# SGLANG_KEVLAR_REPLACE=1: upstream's commands start our server. (Python runs those lines of such files that begin with
# "import", and takes others for directories.)
echo 'import sglang_kevlar.upstream.command as command; command.replace()' >"$packages/sglang_kevlar_command.pth"
# A CPU build of torch with PyPI's torchvision: no `import sglang` without the shim.
if ! python3 -c 'import torchvision' 2>/dev/null; then
    echo 'import sglang_kevlar.platform.torchvision_shim as shim; shim.install_on_import()' \
        >"$packages/sglang_kevlar_torchvision.pth"
fi
python3 -c 'import sglang.launch_server'
python3 -m sglang_kevlar.launch_server --version

# Kubernetes' manifests and our own say `python`.
command -v python >/dev/null || ln -s "$(command -v python3)" /usr/local/bin/python
# The user, where upstream's image has none with this number. Its home, for caches, is anybody's, so that any uid will do.
if ! getent passwd 1000 >/dev/null; then echo 'kevlar:x:1000:0::/home/kevlar:/bin/sh' >>/etc/passwd; fi
mkdir -p /home/kevlar
chmod 1777 /home/kevlar
rm -rf "$sources"/python/*.egg-info "$sources/build" /tmp/* /root/.cache/pip
