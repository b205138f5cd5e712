#!/usr/bin/env bash
# The same job as scripts/local_cpu_train.sh, without questions; takes the same flags.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../scripts/local_cpu_train.sh" --yes "$@"
