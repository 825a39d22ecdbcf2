#!/usr/bin/env bash
# Creates the secrets of a cluster. Existing ones are kept. Nothing is printed. Do not commit the secrets to git.
#
#   cluster/secrets.sh token         ~/.ray/auth_token (Ray's token) and ~/.ray/ptuning_api_keys: for this machine and `ray up`
#   cluster/secrets.sh env           these, and cluster/.env for compose.yaml
#   cluster/secrets.sh kubernetes    these, and Secrets in the namespace ptuning
set -euo pipefail
umask 077

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
token=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}
keys=${PTUNING_API_KEYS_FILE:-$HOME/.ray/ptuning_api_keys}
env=${PTUNING_ENV_FILE:-$here/.env}

random() { head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n'; }

# Write the output of the function $2 to the file $1, unless the file exists.
keep() {
    [[ -s $1 ]] && return
    mkdir -p "$(dirname "$1")"
    "$2" > "$1.new"
    mv "$1.new" "$1"
}

variables() {
    cat << END
RAY_AUTH_TOKEN=$(cat "$token")
PTUNING_API_KEYS=$(cat "$keys")
POSTGRES_PASSWORD=$(random)
S3_ACCESS_KEY=ptuning
S3_SECRET_KEY=$(random)
END
}

# secret NAME KEY=FILE...
secret() {
    local name=$1
    shift
    kubectl --namespace ptuning get secret "$name" > /dev/null 2>&1 && return
    kubectl --namespace ptuning create secret generic "$name" "${@/#/--from-file=}"
}

kubernetes() {
    local made
    made=$(mktemp -d)
    # shellcheck disable=SC2064  # expand the folder's name now
    trap "rm -rf '$made'" EXIT
    printf ptuning > "$made/access-key"
    random > "$made/secret-key"
    random > "$made/password"
    kubectl get namespace ptuning > /dev/null 2>&1 || kubectl create namespace ptuning
    secret ray-token auth_token="$token"
    secret api-keys keys="$keys"
    secret postgres password="$made/password"
    secret s3 access-key="$made/access-key" secret-key="$made/secret-key"
}

case ${1:-} in token | env | kubernetes) ;; *) sed -n '2,6p' "$0" >&2 && exit 2 ;; esac
keep "$token" random
keep "$keys" random
case $1 in
    env) keep "$env" variables ;;
    kubernetes) kubernetes ;;
esac
