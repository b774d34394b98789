#!/usr/bin/env bash
# Fails if a version in constraints.txt has a known weakness. Where the index that knows of them cannot be reached,
# nothing is audited, and that is said.
set -uo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv" && "$work/venv/bin/pip" install --quiet pip-audit ||
    { echo "not audited: pip-audit cannot be installed here"; exit 0; }
# A local version, such as torch's +cpu, is that of the index without its mark.
sed -E 's/^([^#+]*)\+[a-z0-9.]+$/\1/' constraints.txt >"$work/versions.txt"
settings=(--strict --no-deps --disable-pip --progress-spinner off) # strict: what the index does not know is not audited
"$work/venv/bin/pip-audit" --requirement "$work/versions.txt" "${settings[@]}" >"$work/told" 2>&1
code=$?
if [ $code -ne 0 ] && ! grep -q "^Found [0-9]* known " "$work/told"; then
    echo "not audited: $(tail -n 1 "$work/told")"
    exit 0
fi
cat "$work/told"
exit $code
