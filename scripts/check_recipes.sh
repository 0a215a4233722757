#!/usr/bin/env bash
# The GitHub Action's work: check $RECIPES, and add their plans, or what changes against $AGAINST, to $GITHUB_STEP_SUMMARY.
set -euo pipefail
shopt -s globstar nullglob

# patterns are meant to be split and expanded
# shellcheck disable=SC2206
recipes=(${RECIPES:?})
if [ "${#recipes[@]}" = 0 ]; then
    echo "::error::no recipe matches $RECIPES"
    exit 1
fi
offline=()
if [ "${OFFLINE:-}" = true ]; then offline=(--offline); fi
deltamerge check "${offline[@]}" "${recipes[@]}"
if [ "${OFFLINE:-}" = true ]; then exit 0; fi

scratch="$(mktemp -d)"
before=
trap 'rm -rf "$scratch" ${before:+"$before"}' EXIT
for recipe in "${recipes[@]}"; do
    if [ -n "${AGAINST:-}" ] && git show "$AGAINST:./$recipe" >"$scratch/recipe" 2>/dev/null; then
        if cmp -s "$scratch/recipe" "$recipe"; then continue; fi
        # beside the new one, because relative paths start there
        before="$(mktemp "$(dirname "$recipe")/.before-XXXXXX.yaml")"
        cp "$scratch/recipe" "$before"
        deltamerge plan --diff "$before" "$recipe" >"$scratch/shown"
        rm -f "$before"
        sed "1s|.*|### $recipe|" "$scratch/shown"
    else
        printf '### %s\n\n```mermaid\n' "$recipe"
        deltamerge plan --graph "$recipe"
        # shellcheck disable=SC2016  # the backticks are Markdown
        printf '```\n\n<details><summary>every tensor</summary>\n\n```\n'
        deltamerge plan "$recipe"
        printf '```\n\n</details>\n'
    fi
    echo
done >>"${GITHUB_STEP_SUMMARY:-/dev/stdout}"
