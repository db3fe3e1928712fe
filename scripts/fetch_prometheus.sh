#!/usr/bin/env bash
# Debian's Prometheus, unpacked into .venv/prometheus for the tests of the dashboard and the alerts. Installs nothing
# and starts nothing; where there is one already, or none to be had, it does nothing: those tests are then skipped.
set -euo pipefail
folder="$(dirname "$0")/../.venv/prometheus"
if command -v prometheus promtool >/dev/null || [ -x "$folder/usr/bin/promtool" ]; then exit 0; fi
mkdir -p "$folder"
cd "$folder"
fetch() { apt-get download -qq prometheus 2>/dev/null && dpkg -x prometheus_*.deb . && rm prometheus_*.deb; }
fetch || { [ "$(id -u)" = 0 ] && apt-get update -qq 2>/dev/null && fetch; } \
  || echo "no Prometheus to be had here: tests of dashboard and alerts are skipped"
