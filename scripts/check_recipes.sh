#!/usr/bin/env bash
# The GitHub Action's work: check $RECIPES, annotate the lines that are wrong, and add the plans of the good ones, or what
# changes against $AGAINST, to $GITHUB_STEP_SUMMARY. A bad recipe fails the job at its end.
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
scratch="$(mktemp -d)"
before=
trap 'rm -rf -- "$scratch" ${before:+"$before"}; if [ -n "${token:-}" ]; then printf "::%s::\n" "$token"; fi' EXIT
options=()
if [ "${OFFLINE:-}" = true ]; then options=(--offline); fi
if [ -n "${GITHUB_ACTIONS:-}" ]; then # nothing that is printed from here on is a command to the runner
    token="$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')"
    printf '::stop-commands::%s\n' "$token"
    options+=(--output-format github)
fi
code=0
deltamerge check ${options[@]+"${options[@]}"} -- "${recipes[@]}" >"$scratch/checked" || code=$?
# but these lines, in which check has escaped all that comes from a recipe
if [ -n "${token:-}" ] && grep -E '^::(error|warning|notice) file=' "$scratch/checked" >"$scratch/annotations"; then
    printf '::%s::\n' "$token"
    cat -- "$scratch/annotations"
    printf '::stop-commands::%s\n' "$token"
fi
if [ "${OFFLINE:-}" = true ]; then exit "$code"; fi

# A file's name as a heading: control characters and signs of direction as ?, what Markdown would read escaped.
heading() {
    printf '### '
    printf '%s' "$1" | LC_ALL=C tr '[:cntrl:]' '?' |
        LC_ALL=C sed -e $'s/\xe2\x80[\x8b-\x8f\xa8-\xae]/?/g' -e $'s/\xe2\x81[\xa0-\xaf]/?/g' -e 's/[][\\`*<>|#!&~$@]/\\&/g'
    printf '\n'
}

# Run `deltamerge plan`; its output goes to the file `shown`. The errors of a recipe that check has refused are not repeated.
plan() {
    if deltamerge plan "$@" >"$scratch/shown" 2>"$scratch/errors"; then return 0; fi
    if [ "$code" = 0 ]; then
        cat "$scratch/errors" >&2
        code=1
    fi
    return 1
}

for recipe in "${recipes[@]}"; do
    case "$recipe" in */*) folder="${recipe%/*}" ;; *) folder=. ;; esac
    if [ -n "${AGAINST:-}" ] && git show --end-of-options "$AGAINST:./$recipe" >"$scratch/recipe" 2>/dev/null; then
        if cmp -s -- "$scratch/recipe" "$recipe"; then continue; fi
        # beside the new one, because relative paths start there
        before="$(mktemp -- "$folder/.before-XXXXXX.yaml" && printf x)"
        before="${before%$'\n'x}"
        cp -- "$scratch/recipe" "$before"
        planned=0
        plan "--diff=$before" -- "$recipe" || planned=1
        rm -f -- "$before"
        if [ "$planned" = 1 ]; then continue; fi
        heading "$recipe"
        tail -n +2 -- "$scratch/shown"
    else
        plan --graph -- "$recipe" || continue
        heading "$recipe"
        printf '\n```mermaid\n'
        cat -- "$scratch/shown"
        # shellcheck disable=SC2016  # the backticks are Markdown
        printf '```\n\n<details><summary>every tensor</summary>\n\n```\n'
        # what is indented cannot close the block
        plan -- "$recipe" || true
        sed 's/^/    /' -- "$scratch/shown"
        printf '```\n\n</details>\n'
    fi
    echo
done >>"${GITHUB_STEP_SUMMARY:-/dev/stdout}"
exit "$code"
