#!/bin/sh
# Backs an aggregator up, also one that runs:  backup.sh [--with-identity] FEDERATION_TOML NEW_FOLDER
#
# The new folder gets the database as of one moment (SQLite's online backup, or pg_dump), the models that its rows name,
# the audit log and the runs' records, federation.toml, and SHA256SUMS over all of it.
#
# The identity folder is left out: with its keys a backup could speak as the aggregator and sign its results, and backups
# lie in more places than a server does. Keep a copy of it where you keep keys, encrypted; or give --with-identity and
# protect the backup like the keys. An aggregator without its identity can be renewed or set up again by the coordinator,
# and a restored run goes on with it.
#
# FEDSECURE_DATABASE as for `fedsecure serve`. PYTHON: 3.11 or newer.
set -eu
umask 077
fail() { printf 'backup.sh: %s\n' "$1" >&2; exit 1; }

identity=
if [ "${1-}" = --with-identity ]; then identity=$1; shift; fi
[ $# -eq 2 ] || fail 'usage: backup.sh [--with-identity] FEDERATION_TOML NEW_FOLDER'
config=$1
target=${2%/}
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)

[ ! -e "$target" ] || fail "$target is there already; nothing is overwritten"
draft=$target.part.$$
mkdir -m 700 -- "$draft"
trap 'rm -rf -- "$draft"' EXIT
trap 'exit 130' INT TERM

"${PYTHON:-python3}" "$here/aggregator_files.py" copy "$config" "$draft" ${identity:+"$identity"}
cp -- "$config" "$draft/federation.toml"
sums=$(cd -- "$draft" && find . -type f -exec sha256sum {} +)
printf '%s\n' "$sums" >"$draft/SHA256SUMS"
sync
[ ! -e "$target" ] || fail "$target has come into being meanwhile; nothing is overwritten"
mv -- "$draft" "$target"
trap - EXIT
printf '%s\n' "$target"
