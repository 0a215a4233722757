#!/usr/bin/env bash
# Release notes of a version are its section of CHANGELOG.md, and the message of its tag.
#   scripts/release.sh notes            print those of the version in deltamerge/version.py
#   scripts/release.sh tag              make the tag, on a clean tree; then: git push origin vVERSION
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
version="$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' deltamerge/version.py)"

notes() {
    awk -v heading="## [$version]" '
        index($0, heading) == 1 { found = 1; next }
        found && /^## \[/ { exit }
        found { print }
        END { if (!found) exit 1 }
    ' CHANGELOG.md | sed -e '/./,$!d' || { echo "CHANGELOG.md has no section [$version]" >&2; exit 1; }
}

case "${1:-}" in
notes) notes ;;
tag)
    [ -z "$(git status --porcelain)" ] || { echo "commit first: the tag is of what is committed" >&2; exit 1; }
    said="$(notes)"
    git tag --annotate --cleanup=verbatim --message "deltamerge $version

$said" "v$version"
    echo "made v$version; next: git push origin v$version"
    ;;
*)
    sed -n '2,4s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
    ;;
esac
