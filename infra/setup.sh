#!/bin/sh
# Makes .venv from requirements.lock: python's venv, pip for uv alone, uv for the rest, every file checked against its hash.
# Says in one sentence what is missing. Does nothing when .venv was made from these very files; a half-made one is made anew.
set -eu

needed_kib=8388608 # 8 GiB: torch's CUDA libraries are most of it

root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"

fail() {
    echo "$1" >&2
    exit 1
}

new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

python=''
for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
    if command -v "$candidate" >/dev/null && new_enough "$candidate"; then
        python=$(command -v "$candidate")
        break
    fi
done
if [ -z "$python" ]; then
    first=${PYTHON:-python3}
    found=$("$first" --version 2>/dev/null) || found="no $first"
    fail "Stockpot needs Python 3.11 or later and found $found; install one (Debian, Ubuntu: apt-get install python3 python3-venv), or name it: make PYTHON=/path/to/python3 ..."
fi
version=$("$python" -c 'import sys; print(".".join(map(str, sys.version_info[:3])))')

# A .venv is trusted when its last act was to note what it was made from: these files, this Python, this folder.
stamp=.venv/made-from
made_from=$( (cat requirements.lock pyproject.toml infra/setup.sh && echo "$version $root") | sha256sum | cut -d ' ' -f 1)
is_made() { [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$made_from" ]; }
if is_made; then
    exit 0
fi

mkdir -p .stockpot
if command -v flock >/dev/null; then # two commands at once: the second waits, then finds it made
    exec 9>.stockpot/setup.lock
    flock 9
    if is_made; then
        exit 0
    fi
fi

"$python" -c 'import venv, ensurepip' 2>/dev/null ||
    fail "Stockpot needs Python's venv module and found $python $version without it; install it (Debian, Ubuntu: apt-get install python${version%.*}-venv)."

if [ ! -f "$stamp" ]; then
    rm -rf .venv
    free_kib=$(df -Pk . | awk 'NR == 2 { print $4 }')
    [ "$free_kib" -ge "$needed_kib" ] ||
        fail "Stockpot needs 8 GiB of disk for its packages and found $((free_kib / 1024)) MiB free under $root; free some, or check it out elsewhere."
fi
rm -f "$stamp"

echo "Making .venv with Python $version from requirements.lock (several GB, once) ..."
if [ ! -d .venv ]; then
    "$python" -m venv .venv
    awk '/^[^ #]/ { wanted = /^uv==/ } wanted' requirements.lock >.venv/uv.txt
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r .venv/uv.txt
fi
.venv/bin/uv pip sync --quiet --python .venv/bin/python --require-hashes requirements.lock
.venv/bin/uv pip install --quiet --python .venv/bin/python --offline --no-deps --no-build-isolation --editable .
echo "$made_from" >"$stamp"
echo "Made .venv."
