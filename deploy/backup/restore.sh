#!/bin/sh
# Puts a backup of backup.sh back:  restore.sh [--with-identity] BACKUP_FOLDER FEDERATION_TOML
#
# FEDERATION_TOML is the one that `fedsecure serve` will be started with; the backup holds a copy of the old one. The
# run's settings in it must stay as they are (FS-1732), `state`, `identity`, `listen` and `database` may differ.
# Every checksum is compared first. Refused where an aggregator uses the state folder, or where the folder, the database
# or (with --with-identity) the identity folder holds something already.
set -eu
umask 077
fail() { printf 'restore.sh: %s\n' "$1" >&2; exit 1; }

identity=
if [ "${1-}" = --with-identity ]; then identity=$1; shift; fi
[ $# -eq 2 ] || fail 'usage: restore.sh [--with-identity] BACKUP_FOLDER FEDERATION_TOML'
backup=${1%/}
config=$2
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)

[ -f "$backup/SHA256SUMS" ] || fail "$backup is no whole backup: it has no SHA256SUMS"
listed=$(wc -l <"$backup/SHA256SUMS")
found=$(find "$backup" -type f ! -path "$backup/SHA256SUMS" | wc -l)
[ "$listed" -eq "$found" ] || fail "$backup has $found files, and checksums of $listed"
(cd -- "$backup" && sha256sum --quiet --check SHA256SUMS) || fail "$backup is damaged, see above; nothing was restored"

"${PYTHON:-python3}" "$here/aggregator_files.py" put "$backup" "$config" ${identity:+"$identity"}
