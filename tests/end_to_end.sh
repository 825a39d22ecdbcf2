#!/usr/bin/env bash
# The whole system on this machine, and its end: two Ray nodes that ask for a token, an MLflow server on PostgreSQL, an S3 store,
# a job that trains and registers a soft prompt, a job that serves it, a question, and everything stopped again.
#
#   tests/end_to_end.sh [PYTHON]      # Python with ptuning and its test extra; .venv/bin/python by default
#
# Needs PostgreSQL's programs (Debian: postgresql) and psycopg2 for MLflow's server (PyPI: psycopg2-binary; it may lie in a
# folder of its own that PTUNING_PSYCOPG names). Takes about two minutes on two cores. All data lies in one temporary folder.
set -euo pipefail
cd "$(dirname "$0")/.."

python=$(readlink -f "$(dirname "${1:-.venv/bin/python}")")/$(basename "${1:-.venv/bin/python}")
postgres=$(dirname "$(command -v initdb || ls -d /usr/lib/postgresql/*/bin/initdb 2>/dev/null | tail -1)")
[ -x "$postgres/initdb" ] || { echo "end_to_end: no PostgreSQL; install it (Debian: apt-get install postgresql)" >&2; exit 2; }
PYTHONPATH=${PTUNING_PSYCOPG:-} "$python" -c 'import psycopg2, moto' ||
  { echo "end_to_end: pip install psycopg2-binary 'moto[server]'" >&2; exit 2; }

work=$(mktemp -d /tmp/pt-e2e-XXXXXX)
chmod 711 "$work"
pids=()
started=$SECONDS

finish() {
  local code=$? pid
  set +e
  cluster/up-local.sh down
  for pid in "${pids[@]}"; do kill -- "-$pid" 2>/dev/null; done # each leads a group of its own, with what it has started
  for pid in "${pids[@]}"; do wait "$pid" 2>/dev/null; done
  [ "$code" = 0 ] || tail -n 20 "$work"/*.log >&2
  rm -rf "$work"
  [ "$code" = 0 ] && echo "end to end: done in $((SECONDS - started)) s" || echo "end to end: FAILED" >&2
  exit "$code"
}
trap finish EXIT

say() { printf '%4d s  %s\n' "$((SECONDS - started))" "$*" >&2; }
port() { "$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
secret() { od -An -N16 -tx1 /dev/urandom | tr -d ' \n'; }
await() { # await PORT PID: until somebody listens
  for _ in $(seq 240); do
    (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null && return
    kill -0 "$2" 2>/dev/null || return 1
    sleep 0.25
  done
  return 1
}

say "PostgreSQL"
database_port=$(port) password=$(secret)
# The server refuses to run as root.
as=(); [ "$(id -u)" != 0 ] || as=(setpriv --reuid=postgres --regid=postgres --init-groups)
mkdir "$work/postgres"; echo "$password" >"$work/password"
[ "$(id -u)" != 0 ] || chown postgres "$work/postgres" "$work/password"
chmod 700 "$work/postgres"
"${as[@]}" "$postgres/initdb" -D "$work/postgres" -U mlflow -A scram-sha-256 --pwfile "$work/password" >"$work/initdb.log"
setsid "${as[@]}" "$postgres/postgres" -D "$work/postgres" -p "$database_port" -k "$work/postgres" -h 127.0.0.1 -c fsync=off \
  >"$work/postgres.log" 2>&1 &
pids+=($!); await "$database_port" $!

say "S3 store"
store_port=$(port)
export AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY
AWS_ACCESS_KEY_ID=$(secret) AWS_SECRET_ACCESS_KEY=$(secret)
export AWS_DEFAULT_REGION=us-east-1 AWS_ENDPOINT_URL=http://127.0.0.1:$store_port
setsid "$python" -m moto.server -H 127.0.0.1 -p "$store_port" >"$work/store.log" 2>&1 &
pids+=($!); await "$store_port" $!
"$python" -c 'import boto3; [boto3.client("s3").create_bucket(Bucket=name) for name in ("ptuning", "mlflow")]'

say "MLflow"
tracking_port=$(port)
# A bare postgresql:// means psycopg 3 since SQLAlchemy 2.1.
PYTHONPATH=${PTUNING_PSYCOPG:-} MLFLOW_BACKEND_STORE_URI=postgresql+psycopg2://mlflow:$password@127.0.0.1:$database_port/postgres \
  setsid "$python" -m mlflow server --host 127.0.0.1 --port "$tracking_port" --workers 1 --artifacts-destination s3://mlflow \
  >"$work/mlflow.log" 2>&1 &
pids+=($!); await "$tracking_port" $!

say "two Ray nodes"
export PTUNING_CLUSTER=$work/ray PTUNING_PYTHON=$python
PTUNING_CLUSTER_PORT=$(port) PTUNING_DASHBOARD_PORT=$(port)
export PTUNING_CLUSTER_PORT PTUNING_DASHBOARD_PORT
cluster/up-local.sh up # its nodes have the keys of the store in their environment; jobs do not bring them
eval "$(cluster/up-local.sh env)"

ptuning() { "$python" -m ptuning "$@"; }
export PYTHONPATH=$PWD
places=(compute.storage=s3://ptuning/runs "tracking.uri=http://127.0.0.1:$tracking_port")

say "train"
ptuning submit train jobs/sentiment.toml "${places[@]}" compute.workers=2 train.steps=100 --register sentiment --json >"$work/summary.json"
"$python" - "$work/summary.json" <<'PYTHON'
import json, sys
summary = json.load(open(sys.argv[1]))
print(f"       accuracy {summary['metrics']['test_accuracy']:.3f}, {summary['soft_prompt']}, {summary['registered']}")
assert summary["metrics"]["test_accuracy"] > 0.7 and summary["unsent"] == 0
assert summary["soft_prompt"] == "s3://ptuning/runs/sentiment/soft_prompt" and summary["registered"] == "sentiment:1"
PYTHON

say "serve"
server_port=$(port)
ptuning submit serve jobs/sentiment.toml "${places[@]}" "serve.port=$server_port" --json >"$work/served.json"
grep -q '"served": .*"sentiment"' "$work/served.json"

say "ask"
answer=$(ptuning ask sentiment "This movie was terrible." --url "http://127.0.0.1:$server_port/v1")
[ "$answer" = Negative ] || [ "$answer" = Positive ]
say "it says: $answer"

say "what is where"
runs=$(PYTHONPATH=${PTUNING_PSYCOPG:-} PGPASSWORD=$password "$python" - "$database_port" <<'PYTHON'
import psycopg2, sys
with psycopg2.connect(host="127.0.0.1", port=sys.argv[1], user="mlflow", dbname="postgres") as database:
    cursor = database.cursor()
    cursor.execute("select status || ' ' || count(*) from runs group by status")
    print(*(row[0] for row in cursor))
PYTHON
)
[ "$runs" = "FINISHED 1" ]
"$python" - <<'PYTHON'
import boto3
listed = {b: [o["Key"] for o in boto3.client("s3").list_objects_v2(Bucket=b).get("Contents", [])] for b in ("ptuning", "mlflow")}
assert "runs/sentiment/soft_prompt/manifest.json" in listed["ptuning"], listed
assert any(key.endswith("soft_prompt/adapter_model.safetensors") for key in listed["mlflow"]), listed
print("       " + ", ".join(f"{len(keys)} objects in s3://{bucket}" for bucket, keys in listed.items()))
PYTHON
! ptuning jobs list --json | grep -qe "$AWS_SECRET_ACCESS_KEY" -e "$password"

say "stop what is served"
ptuning jobs stop "$(ptuning jobs list --json | "$python" -c 'import json, sys
print(next(job["job"] for job in json.load(sys.stdin)["jobs"] if job["what"] == "serve"))')"
say "down"
