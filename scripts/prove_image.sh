#!/usr/bin/env bash
# Tries the recipe of docker/Dockerfile (target cpu) where there is no container runtime: a root file system by
# debootstrap, the package in it from wheels, and its entry point run as the image's user, read-only, without privileges.
#
#   scripts/prove_image.sh WORK-FOLDER [wheels|rootfs|install|prove ...]     as root; Debian 12 with debootstrap
#
# Stages run in this order; without a name, all of them. PYTHON (default python3.11) must be Debian's version.
set -euo pipefail

SOURCE=$(cd "$(dirname "$0")/.." && pwd)
WORK=$(mkdir -p "$1" && cd "$1" && pwd)
shift
ROOT=$WORK/root
PYTHON=${PYTHON:-python3.11}
MIRROR=${MIRROR:-http://deb.debian.org/debian}
USER_ID=10001

wheels() { # the package and everything that it needs, at the versions of constraints.txt
    "$PYTHON" -m pip wheel --quiet --no-deps --wheel-dir "$WORK/package" "$SOURCE"
    "$PYTHON" -m pip download --quiet --only-binary :all: -c "$SOURCE/constraints.txt" \
        --dest "$WORK/wheels" "$WORK"/package/*.whl
    du -sh "$WORK/wheels"
}

rootfs() { # what `FROM python:...-slim` and the first RUN make
    debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates,wget bookworm "$ROOT" "$MIRROR" >/dev/null
    chroot "$ROOT" groupadd --gid $USER_ID tandem
    chroot "$ROOT" useradd --uid $USER_ID --gid $USER_ID --create-home --home-dir /home/tandem --shell /bin/bash tandem
    chroot "$ROOT" python3 -m venv /opt/tandem
    du -sh "$ROOT"
}

install() { # offline, from the wheels alone
    mkdir -p "$ROOT/wheels" "$ROOT/models"
    cp -l "$WORK"/wheels/*.whl "$ROOT/wheels/"
    chroot "$ROOT" /opt/tandem/bin/pip install --quiet --no-index --find-links /wheels tandem-serve
    rm -rf "$ROOT/wheels"
    cp -r "$SOURCE/models/demo" "$ROOT/models/demo"
    du -sh "$ROOT"
}

prove() {
    cat >"$ROOT/opt/tandem/cluster.yaml" <<YAML
name: proof
primary: {model: /models/demo/primary, resources: {num_cpus: 0.5}}
drafter: {model: /models/demo/drafter, resources: {num_cpus: 0.5}}
router: {model_name: tandem-demo, http_port: 18000, grpc_port: 19000}
YAML
    export ROOT USER_ID
    unshare --mount --fork --pid --mount-proc bash -euo pipefail <<'SANDBOX'
        mount --bind "$ROOT" "$ROOT"
        mount -o remount,ro,bind "$ROOT"
        mount -t proc proc "$ROOT/proc"
        mount --rbind /dev "$ROOT/dev"
        mount -t tmpfs -o size=2g,mode=1777 tmpfs "$ROOT/tmp"
        mount -t tmpfs -o "size=1g,uid=$USER_ID,gid=$USER_ID" tmpfs "$ROOT/home/tandem"
        inside() {
            chroot "$ROOT" setpriv --reuid=$USER_ID --regid=$USER_ID --clear-groups --no-new-privs \
                --bounding-set=-all --inh-caps=-all \
                env -i PATH=/opt/tandem/bin:/usr/bin:/bin HOME=/home/tandem OMP_NUM_THREADS=1 \
                PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 "$@"
        }
        say() { printf '%4d s  %s\n' $SECONDS "$*"; }

        test "$(inside id -u)" = "$USER_ID"
        if inside touch /opt/tandem/x 2>/dev/null; then echo "the root file system can be written"; exit 1; fi
        inside grep -q "CapEff:.0*$" /proc/self/status
        say "runs as user $USER_ID, without capabilities, and cannot write its root file system"
        inside tandem-serve --help >/dev/null
        inside ray --version >/dev/null
        say "tandem-serve and ray start"
        inside tandem-serve complete "def read_lines(path):" --pair /models/demo --max-tokens 32 | grep . >/dev/null
        say "a completion by both models in one process"
        inside tandem-serve up /opt/tandem/cluster.yaml >"$ROOT/tmp/up.log" 2>&1 &
        cluster=$!
        deadline=$((SECONDS + 300)) # a quarter of a minute on an idle machine
        until grep -q "Ctrl-C" "$ROOT/tmp/up.log"; do
            kill -0 $cluster && [ $SECONDS -lt $deadline ] || { cat "$ROOT/tmp/up.log"; exit 1; }
            sleep 0.1
        done
        say "a cluster on Ray is up"
        inside wget -q -O - --header "content-type: application/json" \
            --post-data '{"model": "tandem-demo", "prompt": "def read_lines(path):", "max_tokens": 16, "temperature": 0}' \
            http://127.0.0.1:18000/v1/completions | grep '"text"' >/dev/null
        say "a completion over HTTP"
        pkill -TERM -P $cluster 2>/dev/null || kill -TERM $cluster
        wait $cluster
        say "drained and gone"
SANDBOX
}

for stage in $([ $# -gt 0 ] && echo "$@" || echo wheels rootfs install prove); do
    SECONDS=0
    "$stage"
    echo "$stage: $SECONDS s"
done
