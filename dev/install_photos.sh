#!/usr/bin/env bash
# Installs Debian's Fashion-MNIST where root and apt are at hand; elsewhere FashionScenes has torchvision download it.
set -euo pipefail
[[ -e /usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz ]] && exit 0
[[ $(id -u) == 0 ]] && command -v apt-get >/dev/null || exit 0
export DEBIAN_FRONTEND=noninteractive
{ apt-get update --quiet --quiet && apt-get install --quiet --quiet --yes --no-install-recommends dataset-fashion-mnist; } ||
    echo "The Debian package dataset-fashion-mnist could not be installed; torchvision downloads the photos."
