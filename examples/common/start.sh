# shellcheck shell=bash
# What every example begins with: source it, then set sizes and arrays, then `launch "$@"`.
# Variables that it reads and sets are in the table of examples/README.md. A value from the environment always wins,
# then the toy sizes (MEGATRON_ET_CPU=1), then the example's own.

EXAMPLES=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
REPOSITORY=$(dirname "$EXAMPLES")
MODEL=$(basename "$0" .sh)
NOTES=()
DRY_RUN=${DRY_RUN:-}
[[ $DRY_RUN != 0 ]] || DRY_RUN=

die() {
  printf 'examples/%s.sh: %s\n' "$MODEL" "$*" >&2
  exit 2
}

note() { NOTES+=("$*"); } # printed by launch, before the command

least() { (($1 < $2)) && echo "$1" || echo "$2"; }

on_cpu() { [[ ${MEGATRON_ET_CPU:-} =~ ^(1|[Tt][Rr][Uu][Ee]|[Yy][Ee][Ss])$ ]]; } # as megatron_et.run.cpu reads it

number() { [[ ${!1} =~ ^[0-9]+$ ]] || die "$1 is '${!1}': it must be a whole number"; }

# shellcheck source=common/cluster.sh
source "$EXAMPLES/common/cluster.sh"
# shellcheck source=common/toy.sh
source "$EXAMPLES/common/toy.sh"
# shellcheck source=common/router.sh
source "$EXAMPLES/common/router.sh"
# shellcheck source=common/arguments.sh
source "$EXAMPLES/common/arguments.sh"
# shellcheck source=common/launch.sh
source "$EXAMPLES/common/launch.sh"
