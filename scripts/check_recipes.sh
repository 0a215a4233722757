#!/usr/bin/env bash
# The GitHub Action's work: check $RECIPES, and add their plans, or what changes against $AGAINST, to $GITHUB_STEP_SUMMARY.
# Names of files come from whoever opened the pull request: they are data everywhere, in commands, Markdown and the log.
set -euo pipefail
shopt -s globstar nullglob

# patterns are meant to be split and expanded
# shellcheck disable=SC2206
recipes=(${RECIPES:?})
if [ "${#recipes[@]}" = 0 ]; then
    said="${RECIPES//'%'/%25}"
    printf '::error::no recipe matches %s\n' "${said//[$'\r\n']/ }"
    exit 1
fi
if [ -n "${GITHUB_ACTIONS:-}" ]; then # nothing that is printed from here on is a command to the runner
    token="$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')"
    printf '::stop-commands::%s\n' "$token"
    trap 'printf "::%s::\n" "$token"' EXIT
fi
offline=()
if [ "${OFFLINE:-}" = true ]; then offline=(--offline); fi
deltamerge check ${offline[@]+"${offline[@]}"} -- "${recipes[@]}"
if [ "${OFFLINE:-}" = true ]; then exit 0; fi

scratch="$(mktemp -d)"
before=
trap 'rm -rf -- "$scratch" ${before:+"$before"}; if [ -n "${token:-}" ]; then printf "::%s::\n" "$token"; fi' EXIT

# A file's name as a heading: control characters and signs of direction as ?, what Markdown would read escaped.
heading() {
    printf '### '
    printf '%s' "$1" | LC_ALL=C tr '[:cntrl:]' '?' |
        LC_ALL=C sed -e $'s/\xe2\x80[\x8b-\x8f\xa8-\xae]/?/g' -e $'s/\xe2\x81[\xa0-\xaf]/?/g' -e 's/[][\\`*<>|#!&~$@]/\\&/g'
    printf '\n'
}

for recipe in "${recipes[@]}"; do
    case "$recipe" in */*) folder="${recipe%/*}" ;; *) folder=. ;; esac
    if [ -n "${AGAINST:-}" ] && git show --end-of-options "$AGAINST:./$recipe" >"$scratch/recipe" 2>/dev/null; then
        if cmp -s -- "$scratch/recipe" "$recipe"; then continue; fi
        # beside the new one, because relative paths start there
        before="$(mktemp -- "$folder/.before-XXXXXX.yaml" && printf x)"
        before="${before%$'\n'x}"
        cp -- "$scratch/recipe" "$before"
        deltamerge plan "--diff=$before" -- "$recipe" >"$scratch/shown"
        rm -f -- "$before"
        heading "$recipe"
        tail -n +2 -- "$scratch/shown"
    else
        heading "$recipe"
        printf '\n```mermaid\n'
        deltamerge plan --graph -- "$recipe"
        # shellcheck disable=SC2016  # the backticks are Markdown
        printf '```\n\n<details><summary>every tensor</summary>\n\n```\n'
        # what is indented cannot close the block
        deltamerge plan -- "$recipe" | sed 's/^/    /'
        printf '```\n\n</details>\n'
    fi
    echo
done >>"${GITHUB_STEP_SUMMARY:-/dev/stdout}"
